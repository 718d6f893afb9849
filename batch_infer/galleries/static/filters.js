// The filters beside the grid, and the chips that show which are active.
"use strict";

(function (gallery) {
  const { make, icon } = gallery.dom;
  const { labels } = gallery;
  const FIRST = ["status", "nsfw_content_detected", "rating", "mark"];
  const PARAMETERS = ["scheduler", "num_inference_steps", "guidance_scale", "guidance_rescale", "width", "height", "negative_prompt"];
  const OPEN_CARRIED = 3;
  const MOST_OPEN_SCORES = 4;

  /** Whether a filter by this column can leave out some results but not all. */
  function isUseful(table, column) {
    if (FIRST.includes(column.name)) return true;
    if (column.numbers) return column.min < column.max;
    if (!(column.codes instanceof Uint8Array)) return false;
    if (column.values.length === 0) return false;
    const first = column.codes[0];
    return column.codes.subarray(0, table.loaded).some((code) => code !== first);
  }

  /** Return the columns with a filter, in groups with a title. */
  function arrange(table) {
    const columns = [...table.columns.values()].filter((column) => (column.codes || column.numbers) && isUseful(table, column));
    const named = (names) => names.map((name) => columns.find((column) => column.name === name && !column.carried)).filter(Boolean);
    const carried = columns.filter((column) => column.carried);
    const scores = columns.filter((column) => column.score);
    const [first, parameters] = [named(FIRST), named(PARAMETERS)];
    const used = new Set([...first, ...parameters, ...carried, ...scores]);
    return [
      { title: "", columns: first },
      { title: "Your columns", columns: carried },
      { title: "Parameters", columns: parameters },
      { title: "Safety scores", columns: scores },
      { title: "More", columns: columns.filter((column) => !used.has(column) && column.name !== "image_index") },
    ].filter((group) => group.columns.length);
  }

  class Filters {
    constructor(table, container, chips) {
      this.table = table;
      this.container = container;
      this.chips = chips;
      this.sections = new Map();
    }

    /** Make the sections, again when all rows are loaded: only then it is known which columns have more than one value. */
    build() {
      const former = this.sections;
      const { activeElement } = document;
      const focused = [...former.values()].find(({ details }) => details.contains(activeElement));
      this.sections = new Map();
      const nodes = [];
      for (const { title, columns } of arrange(this.table)) {
        const sections = columns.map((column, index) => {
          const opens = (!title && !column.local) || (title === "Your columns" && index < OPEN_CARRIED && column.codes);
          return this.keepSection(former.get(column.name)) ?? this.makeSection(column, former.get(column.name)?.details.open ?? opens);
        });
        if (columns.length > MOST_OPEN_SCORES && columns[0].score) nodes.push(this.makeFold(`${title} (${columns.length})`, sections));
        else nodes.push(...(title ? [make("h2", { class: "filter-group", text: title })] : []), ...sections);
      }
      this.container.replaceChildren(...nodes);
      if (!focused) return;
      const summary = this.sections.get(focused.column.name)?.details.firstChild;
      (activeElement.isConnected ? activeElement : summary)?.focus({ preventScroll: true });
    }

    /** Put sections into one that is closed at first. */
    makeFold(title, sections) {
      const isOpen = this.fold?.open ?? false;
      const hasFocus = this.fold?.firstChild === document.activeElement;
      const summary = make("summary", {}, make("h2", { class: "section-name", text: title }), icon("chevron"));
      this.fold = make("details", { class: "section" }, summary, ...sections);
      this.fold.open = isOpen;
      // The caller puts the new node into the page first.
      if (hasFocus) queueMicrotask(() => summary.focus({ preventScroll: true }));
      return this.fold;
    }

    /** Return the node of a section that stays as it is: the values of categories are known from the beginning. */
    keepSection(section) {
      if (!section || section.isRange) return null;
      this.sections.set(section.column.name, section);
      return section.details;
    }

    makeSection(column, isOpen) {
      const isRange = Boolean(column.numbers);
      const onChange = (name, value) => gallery.change(isRange ? "ranges" : "facets", name, value);
      const makeControl = () => new (isRange ? gallery.Range : gallery.Facet)(column, onChange);
      const summary = make("summary", {}, make("span", { class: "section-name", text: labels.label(column) }), icon("chevron"));
      const details = make("details", { class: "section" }, summary);
      details.open = isOpen;
      const section = { column, makeControl, details, isStale: true, isRange };
      details.addEventListener("toggle", () => this.updateSection(section));
      this.sections.set(column.name, section);
      return details;
    }

    updateSection(section) {
      const { column, details, isRange } = section;
      const value = this.state?.[isRange ? "ranges" : "facets"].get(column.name);
      details.classList.toggle("is-active", Boolean(value));
      if (!details.open || !section.isStale || !this.match) return;
      section.isStale = false;
      if (!section.control) {
        section.control = section.makeControl();
        details.append(section.control.node);
      }
      section.control.update(this.match, value);
    }

    /** Show the counts of a match. Closed sections are made and updated when they are opened. */
    update(match, state) {
      this.match = match;
      this.state = state;
      for (const section of this.sections.values()) {
        section.isStale = true;
        this.updateSection(section);
      }
      this.fold?.classList.toggle("is-active", Boolean(this.fold.querySelector(".is-active")));
    }

    showChips(state) {
      const chips = [];
      if (state.text) chips.push(this.chip(`“${state.text}”`, () => gallery.setState({ text: "" })));
      for (const [name, keys] of state.facets) {
        const column = this.table.get(name);
        if (!column) continue;
        const names = [...keys].map((key) => (key === null ? labels.nothing(column) : this.nameOf(column, key)));
        const shown = names.length > 3 ? `${names.length} values` : names.join(", ");
        chips.push(this.chip(`${labels.label(column)}: ${shown}`, () => gallery.change("facets", name, new Set())));
      }
      for (const [name, range] of state.ranges) {
        const column = this.table.get(name);
        if (column) chips.push(this.chip(`${labels.label(column)}: ${formatRange(column, range)}`, () => gallery.change("ranges", name, null)));
      }
      if (chips.length > 1) chips.push(make("button", { type: "button", class: "link-button", text: "Clear all", onclick: gallery.clearFilters }));
      const index = [...this.chips.children].indexOf(document.activeElement);
      this.chips.replaceChildren(...chips);
      if (index >= 0) (chips[index] ?? chips.at(-1) ?? focusable("filters-button") ?? focusable("search"))?.focus();
    }

    nameOf(column, key) {
      const code = column.values.findIndex((value) => String(value) === key);
      return code < 0 ? key : column.labelOf(code);
    }

    chip(text, onclick) {
      return make("button", { type: "button", class: "chip", "aria-label": `Remove filter ${text}`, title: text, onclick }, make("span", { text, dir: "auto" }), icon("close"));
    }
  }

  /** Return an element if it is shown. */
  function focusable(id) {
    const element = document.getElementById(id);
    return element.offsetParent && element;
  }

  function formatRange(column, { min, max }) {
    const format = (number) => labels.value(column, number);
    if (min === -Infinity) return `up to ${format(max)}`;
    return max === Infinity ? `from ${format(min)}` : `${format(min)} to ${format(max)}`;
  }

  gallery.Filters = Filters;
})((window.BatchInferGallery ??= {}));
