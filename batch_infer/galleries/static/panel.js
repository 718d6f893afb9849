// The panel beside an open image: its rating, all its values to copy, and commands.
"use strict";

(function (gallery) {
  const { make, icon, iconButton, copy } = gallery.dom;
  const { labels } = gallery;
  const MOST_SIBLINGS = 24;
  const FILE = "image.csv";
  const PARAMETERS = ["seed", "num_inference_steps", "guidance_scale", "guidance_rescale", "scheduler", "width", "height"];
  const TEXTS = new Set(["prompt", "negative_prompt", "error"]);
  const OUTCOME = ["status", "error", "nsfw_content_detected", "safety_checker", "prompt_truncated", "seconds", "finished_at", "id", "image_index"];

  /** Return all values of a row: those of the table, and those of its details, which may have longer texts. */
  function valuesOf(table, row, details) {
    const values = new Map();
    for (const description of table.meta.columns) {
      const { name } = description;
      const cell = details?.[name] ?? table.value(name, row) ?? null;
      values.set(name, { column: description, cell: description.kind === "category" && description.detail && cell !== null ? description.values[cell] : cell });
    }
    return values;
  }

  /** Parse a value of kind json for a copy of all values. */
  function plainValue({ column, cell }) {
    if (column.kind !== "json" || cell === null) return cell;
    try {
      return JSON.parse(cell);
    } catch {
      return cell;
    }
  }

  function row({ column, cell }) {
    const name = labels.label(column);
    if (cell === null) return null;
    const text = labels.value(column, cell);
    const exact = column.kind === "time" ? new Date(cell * 1000).toISOString() : typeof cell === "number" ? String(cell) : text;
    const button = iconButton("copy", `Copy ${name}`, () => copy(exact, `${name} copied`), "copy-value");
    const className = text.length > 60 ? "value is-long" : "value";
    return make("div", { class: className }, make("dt", { text: name }), make("dd", {}, make("span", { class: "value-text", text, dir: "auto" }), button));
  }

  function list(title, entries) {
    const rows = entries.filter(Boolean).map(row).filter(Boolean);
    return rows.length ? make("section", { class: "values" }, make("h3", { text: title }), make("dl", {}, ...rows)) : null;
  }

  function command(title, hint, text) {
    const button = iconButton("copy", `Copy the command: ${title}`, () => copy(text, "Command copied"), "copy-command");
    return make("div", { class: "command" }, make("p", { text: title, title: hint }), make("div", { class: "command-line" }, make("code", { text }), button));
  }

  function stars(table, ofRow, onRate) {
    const rating = gallery.ratings.ratingOf(ofRow);
    const buttons = [1, 2, 3, 4, 5].map((value) =>
      make("button", {
        type: "button",
        class: value <= rating ? "star is-on" : "star",
        "aria-label": `Rate ${value} of 5`,
        "aria-pressed": String(value === rating),
        title: `Rate ${value} of 5 (key ${value})`,
        onclick: () => onRate(value),
      }, icon("star")),
    );
    return make("div", { class: "stars", role: "group", "aria-label": "Rating" }, ...buttons);
  }

  class Panel {
    constructor(table, actions) {
      this.table = table;
      this.actions = actions;
      this.node = make("aside", { class: "panel", "aria-label": "Details", tabindex: "-1" });
      for (const type of ["wheel", "pointerdown", "touchstart", "click"]) this.node.addEventListener(type, (event) => event.stopPropagation(), { passive: true });
    }

    /** Show a row. `details` is null until its file is loaded. */
    show(ofRow, details, place, siblings) {
      const { table } = this;
      const values = valuesOf(table, ofRow, details);
      const entries = (names) => names.map((name) => values.get(name)).filter((entry) => entry && !entry.column.carried);
      const used = new Set([...PARAMETERS, ...OUTCOME, ...TEXTS, "safety_scores"]);
      const all = [...values.values()];
      const scrollTop = this.row === ofRow ? this.node.scrollTop : 0;
      const restoreFocus = this.rememberFocus();
      this.row = ofRow;
      this.node.replaceChildren(
        ...[
          this.header(ofRow, place),
          this.problem(ofRow),
          this.text(values.get("prompt"), "Prompt"),
          this.text(values.get("negative_prompt"), "Negative prompt"),
          this.siblings(ofRow, siblings),
          list("Parameters", entries(PARAMETERS)),
          list("Your columns", all.filter(({ column }) => column.carried)),
          list("Result", entries(OUTCOME).filter(({ column }) => column.name !== "error")),
          this.commands(ofRow, details),
          this.scores(ofRow),
          list("More", all.filter(({ column }) => !column.carried && !used.has(column.name))),
          details ? null : make("p", { class: "panel-wait", text: this.failure ?? "Loading more values" }),
          make("button", { type: "button", class: "button is-wide", onclick: () => this.copyAll(values) }, icon("copy"), "Copy all values as JSON"),
        ].filter(Boolean),
      );
      this.node.scrollTop = scrollTop;
      restoreFocus();
    }

    /** Return a function that focuses the control that has the focus now, or the panel, after its content was replaced. */
    rememberFocus() {
      const { activeElement } = document;
      if (!this.node.contains(activeElement) || activeElement === this.node) return () => {};
      const nameOf = (button) => button.getAttribute("aria-label") ?? button.textContent;
      const name = nameOf(activeElement);
      const same = () => [...this.node.querySelectorAll("button")].filter((button) => nameOf(button) === name);
      const index = same().indexOf(activeElement);
      return () => (same()[index] ?? this.node).focus({ preventScroll: true });
    }

    header(ofRow, place) {
      const isMarked = gallery.ratings.isMarked(ofRow);
      const mark = iconButton("mark", "Mark (key m)", () => this.actions.mark(ofRow), "panel-mark");
      mark.setAttribute("aria-pressed", isMarked);
      const status = this.table.value("status", ofRow);
      return make(
        "header",
        { class: "panel-header" },
        make("div", { class: "panel-place" }, make("span", { class: "status-label", "data-status": status, text: status }), make("span", { text: place })),
        make("div", { class: "panel-actions" }, stars(this.table, ofRow, (value) => this.actions.rate(ofRow, value)), mark),
      );
    }

    problem(ofRow) {
      const error = this.table.value("error", ofRow) ?? this.table.problems.get(ofRow);
      return error ? make("p", { class: "panel-error", "data-status": this.table.value("status", ofRow), text: error, dir: "auto" }) : null;
    }

    text(entry, name) {
      if (!entry?.cell) return null;
      const button = iconButton("copy", `Copy ${name}`, () => copy(entry.cell, `${name} copied`), "copy-value");
      return make("section", { class: "panel-text" }, make("h3", { text: name }), make("div", {}, make("p", { text: entry.cell, dir: "auto" }), button));
    }

    /** Other images of the same prompt, to compare seeds and settings. */
    siblings(ofRow, rows) {
      if (rows.length < 2) return null;
      const caption = gallery.captions.differing(this.table, Uint32Array.from(rows), "prompt");
      const items = rows.slice(0, MOST_SIBLINGS).map((other) => {
        const thumb = this.table.thumbs[other];
        const words = gallery.captions.join(caption, other, "\n") || this.table.value("id", other);
        const name = this.table.thumbs[other] ? words : `${words}\n${this.table.value("status", other)}`;
        const hidden = gallery.tile.isHidden(this.table, other) ? " is-hidden" : "";
        const picture = thumb ? make("img", { src: `thumbs/${thumb}`, alt: "", decoding: "async" }) : make("span", { class: "no-image", text: this.table.value("status", other) });
        return make("button", { type: "button", class: `sibling${hidden}`, "aria-current": other === ofRow ? "true" : null, "aria-label": name, onclick: () => this.actions.open(other) }, picture, make("span", { class: "sibling-text", text: words }));
      });
      return make("section", { class: "siblings" }, make("h3", { text: `Same prompt: ${labels.plural(rows.length, "result")}` }), make("div", { class: "sibling-list" }, ...items));
    }

    scores(ofRow) {
      const scores = this.table.value("safety_scores", ofRow);
      if (!scores) return null;
      const rows = Object.entries(scores).map(([name, score]) => row({ column: { name, carried: true }, cell: score }));
      return make("section", { class: "values" }, make("h3", { text: "Safety scores" }), make("dl", {}, ...rows));
    }

    commands(ofRow, details) {
      const { out } = this.table.meta;
      const id = this.table.value("id", ofRow);
      const index = this.table.value("image_index", ofRow) ?? 0;
      const hint = "For a POSIX shell, in the folder in which the gallery was made";
      const isRendered = ["ok", "flagged"].includes(this.table.value("status", ofRow));
      const recipe = isRendered ? command("Script for plain diffusers", hint, gallery.commands.exportRecipe(out, id, index)) : null;
      const again = command("Render this row again", hint, gallery.commands.retry(out, id));
      return make("section", { class: "commands" }, make("h3", { text: "Commands" }), again, recipe, this.otherParameters(ofRow, details));
    }

    /** A table of this image alone, with the whole texts of its details, and the command that renders it. */
    otherParameters(ofRow, details) {
      const save = () => gallery.dom.save(FILE, gallery.ratings.toCsv([ofRow], details));
      const button = make("button", { type: "button", class: "button is-wide", onclick: save }, icon("export"), `Save ${FILE}`);
      button.disabled = !details;
      const run = gallery.commands.runTable(this.table.meta.run.model_options, FILE);
      const purpose = make("p", { text: "To render this image with other parameters and a new id, save its row and change the cells:" });
      const { disarm } = gallery.ratings;
      const texts = ["prompt", "negative_prompt"].map((name) => this.table.value(name, ofRow) ?? "");
      if (texts.some((text) => disarm(text) !== text)) purpose.append(" Remove the apostrophe before a prompt too: it keeps spreadsheets from running the text as a formula.");
      return make("div", { class: "command" }, purpose, button, command("Then run this in the folder of the file:", "For a POSIX shell", run));
    }

    copyAll(values) {
      const entries = [...values].map(([name, entry]) => [name, plainValue(entry)]);
      copy(JSON.stringify(Object.fromEntries(entries), null, 2), "All values copied");
    }
  }

  gallery.Panel = Panel;
})((window.BatchInferGallery ??= {}));
