// The controls above the grid, the dialogs, and the states without results.
"use strict";

(function (gallery) {
  const { make, copy } = gallery.dom;
  const { labels } = gallery;
  const FILE_NAMES = { rated: "ratings.csv", marked: "marked.csv", shown: "results.csv" };
  const byId = (id) => document.getElementById(id);

  /** Fill a select with the names of columns. */
  function fillSelect(select, first, columns, chosen) {
    const names = columns.map((column) => column.name).join("\n");
    if (select.names === names) {
      select.value = chosen ?? "";
      return;
    }
    select.names = names;
    const toOption = (column) => make("option", { value: column.name, text: labels.label(column) });
    const options = columns.filter((column) => !column.score).map(toOption);
    const scores = columns.filter((column) => column.score).map(toOption);
    if (scores.length) options.push(make("optgroup", { label: "Safety scores" }, ...scores));
    select.replaceChildren(make("option", { value: "", text: first }), ...options);
    select.value = columns.some((column) => column.name === chosen) ? chosen : "";
  }

  /** Columns by which grouping makes sense: the prompt, and categories with several values. */
  function groupColumns(table) {
    const isGroup = (column) => column.name === "prompt" || (column.codes instanceof Uint8Array && column.values.length > 1);
    const columns = [...table.columns.values()].filter(isGroup);
    return columns.sort((a, b) => Number(b.name === "prompt") - Number(a.name === "prompt"));
  }

  const sortColumns = (table) => [...table.columns.values()].filter((column) => column.codes || column.numbers);

  class Toolbar {
    constructor(table, grid) {
      this.table = table;
      this.grid = grid;
      byId("search").addEventListener("input", (event) => gallery.setState({ text: event.target.value }));
      byId("group").addEventListener("change", (event) => gallery.setState({ group: event.target.value || null }));
      byId("sort").addEventListener("change", (event) => this.sort(event.target.value));
      byId("direction").addEventListener("click", () => this.reverse());
      this.bindChoices();
      this.bindDialogs();
      for (const button of document.querySelectorAll("[data-reset]")) button.addEventListener("click", gallery.clearFilters);
    }

    bindChoices() {
      for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => gallery.setState({ view: button.dataset.view }));
      for (const button of document.querySelectorAll("[data-size]:is(button)")) {
        button.addEventListener("click", () => {
          this.grid.setSize(button.dataset.size);
          this.showSize();
        });
      }
      const theme = byId("theme");
      const show = () => (theme.value = gallery.theme.current());
      theme.addEventListener("change", () => gallery.theme.choose(theme.value));
      show();
      this.showSize();
      gallery.drawer.bind();
    }

    showSize() {
      for (const button of document.querySelectorAll("[data-size]:is(button)")) button.setAttribute("aria-pressed", button.dataset.size === this.grid.size);
    }

    bindDialogs() {
      for (const button of document.querySelectorAll("[data-dialog]")) button.addEventListener("click", () => this.openDialog(button.dataset.dialog));
      for (const button of document.querySelectorAll("dialog [data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
      for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => this.export(button.dataset.export));
      for (const name of ["retry", "run"]) {
        byId(`copy-${name}`).addEventListener("click", () => copy(byId(`${name}-command`).textContent, "Command copied"));
      }
    }

    openDialog(name) {
      if (name === "export") {
        this.showExport();
        this.showCommands(FILE_NAMES[this.rowsOf("rated").length ? "rated" : "shown"]);
      }
      byId(`dialog-${name}`).showModal();
    }

    rowsOf(kind) {
      if (kind === "shown") return this.grid.view.rows;
      const rows = gallery.ratings.ratedRows();
      return kind === "marked" ? rows.filter((row) => gallery.ratings.isMarked(row)) : rows;
    }

    /** Show how many results each table has. Tables can be saved once all results are loaded. */
    showExport() {
      const isComplete = this.table.loaded >= this.table.size;
      for (const button of document.querySelectorAll("[data-export]")) {
        const rows = this.rowsOf(button.dataset.export);
        button.querySelector(".export-count").textContent = isComplete ? labels.count(rows.length) : "Loading";
        button.disabled = !isComplete || rows.length === 0;
      }
    }

    export(kind) {
      gallery.dom.save(FILE_NAMES[kind], gallery.ratings.toCsv(this.rowsOf(kind)));
      this.showCommands(FILE_NAMES[kind]);
    }

    /** Show the commands for an exported file. */
    showCommands(file) {
      const { out, run } = this.table.meta;
      byId("retry-command").textContent = gallery.commands.retryTable(out, file);
      byId("run-command").textContent = gallery.commands.runTable(run.model_options, file);
    }

    sort(name) {
      gallery.setState({ sort: name ? { name, descending: name === "rating" } : null });
    }

    reverse() {
      const { sort } = gallery.state;
      if (sort) gallery.setState({ sort: { ...sort, descending: !sort.descending } });
    }

    /** Show a state and its number of results. */
    update(state, view) {
      const { meta, loaded, size } = this.table;
      if (byId("search").value !== state.text) byId("search").value = state.text;
      fillSelect(byId("group"), "No grouping", groupColumns(this.table), state.group);
      fillSelect(byId("sort"), "Table order", sortColumns(this.table), state.sort?.name);
      byId("direction").disabled = !state.sort;
      byId("direction").classList.toggle("is-descending", Boolean(state.sort?.descending));
      byId("direction").setAttribute("aria-label", state.sort?.descending ? "Descending; sort ascending" : "Ascending; sort descending");
      for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", button.dataset.view === state.view);
      const active = state.facets.size + state.ranges.size;
      byId("filters-count").textContent = active || "";
      const isFiltered = active > 0 || state.text !== "";
      const groups = view.starts ? ` in ${labels.plural(view.starts.length - 1, "group")}` : "";
      byId("count").textContent = `${isFiltered ? `${labels.count(view.rows.length)} of ${labels.plural(size, "result")}` : labels.plural(size, "result")}${groups}`;
      byId("filters-done").textContent = `Show ${labels.plural(view.rows.length, "result")}`;
      byId("loading").textContent = loaded < size ? `Loading ${Math.floor((100 * loaded) / size)}%` : "";
      byId("left-out").textContent = meta.left_out ? `${labels.plural(meta.left_out, "more result")} not in this gallery` : "";
      if (byId("dialog-export").open) this.showExport();
      this.showEmpty(state, view, loaded >= size);
    }

    showEmpty(state, view, isComplete) {
      const isEmpty = this.table.size === 0;
      const hasNoMatch = !isEmpty && isComplete && view.rows.length === 0;
      byId("empty").hidden = !isEmpty;
      byId("no-match").hidden = !hasNoMatch;
      byId("charts").hidden = state.view !== "charts" || isEmpty || hasNoMatch;
      byId("grid").hidden = state.view === "charts" || isEmpty || hasNoMatch;
      document.querySelector(".arrange").hidden = state.view === "charts";
    }
  }

  gallery.Toolbar = Toolbar;
})((window.BatchInferGallery ??= {}));
