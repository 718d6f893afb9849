// Start the page: load the data, and show the results again whenever the state changes.
"use strict";

(function (gallery) {
  const REFRESH_MS = 300;
  const byId = (id) => document.getElementById(id);
  let parts = null;
  let leaving = null; // while the browser goes back: the function that ends the wait, and its promise
  let generation = 0;

  gallery.state = gallery.links.decode(window.location.hash);

  /** Show an error that the reader can act on. */
  function fail(error) {
    byId("error").hidden = false;
    byId("error").textContent = error.message;
  }

  /**
   * Show the results of the state. With `keepsPlace`, the grid does not scroll to the top. With `isLoading`, the counts
   * of the filters stay as they are.
   */
  gallery.refresh = async function ({ keepsPlace = true, isLoading = false } = {}) {
    const { table, grid, filters, toolbar, charts } = parts;
    const started = performance.now();
    const number = ++generation;
    const { state } = gallery;
    const { match, rows, starts } = await gallery.query.run(table, state);
    if (number !== generation) return;
    const view = { rows, starts, groupName: state.group, sortName: state.sort?.name };
    grid.setView(view, { keepsPlace });
    toolbar.update(state, view);
    if (state.view === "charts") charts.show(rows);
    filters.showChips(state);
    if (isLoading) return;
    await gallery.dom.pause();
    if (number !== generation) return;
    filters.update(match, state);
    gallery.lastRefresh = { number, milliseconds: performance.now() - started, rows: rows.length };
    window.dispatchEvent(new CustomEvent("refreshed"));
  };

  /** Change the state and show its results. */
  gallery.setState = function (changes) {
    gallery.state = { ...gallery.state, ...changes };
    gallery.links.write(gallery.state);
    return gallery.refresh({ keepsPlace: false });
  };

  /** Set or remove the filter of a column. `kind` is "facets" or "ranges". */
  gallery.change = function (kind, name, value) {
    const filters = new Map(gallery.state[kind]);
    if (value && (kind === "ranges" || value.size)) filters.set(name, value);
    else filters.delete(name);
    gallery.setState({ [kind]: filters });
  };

  gallery.clearFilters = () => gallery.setState({ text: "", facets: new Map(), ranges: new Map() });

  /** Called by the viewer when it shows a row: put the row into the address. */
  gallery.opened = function (row) {
    const { table } = parts;
    const wasOpen = gallery.state.open !== null;
    gallery.state.open = { id: table.value("id", row), image: table.value("image_index", row) ?? 0 };
    if (leaving) leaving.promise.then(() => gallery.links.write(gallery.state, true));
    else gallery.links.write(gallery.state, !wasOpen);
  };

  /** Go back to the address before an image was opened, without following it. */
  function leave() {
    let end = null;
    const promise = new Promise((resolve) => (end = resolve));
    leaving = { end, promise };
    window.history.back();
  }

  /** Called by the viewer when it has closed: remove the row from the address, and focus its tile. */
  gallery.closed = function (position) {
    if (gallery.state.open !== null) {
      gallery.state.open = null;
      if (window.history.state?.pushed) leave();
      else gallery.links.write(gallery.state);
    }
    if (gallery.state.view === "images") parts.grid.focus(position);
  };

  /** Open a row, without the filters if they leave it out. */
  gallery.openRow = async function (row) {
    const { grid, viewer } = parts;
    if (!grid.view.rows.includes(row)) {
      viewer.close(true);
      await gallery.clearFilters();
    }
    viewer.open(grid.view.rows.indexOf(row));
  };

  /** Open the row of the address once it is loaded. */
  function openLinked() {
    const { table, viewer } = parts;
    const { open } = gallery.state;
    if (!open || viewer.isOpen) return;
    const row = table.find(open.id, open.image);
    if (row >= 0) gallery.openRow(row);
    else if (table.loaded >= table.size) gallery.setState({ open: null });
  }

  /** Follow the address after Back, Forward, or an edit by hand. */
  async function followAddress() {
    if (leaving) {
      leaving.end();
      leaving = null;
      return;
    }
    const state = gallery.links.decode(window.location.hash);
    if (gallery.links.encode(state) === gallery.links.encode(gallery.state)) return;
    const onlyRow = gallery.links.encode({ ...state, open: null }) === gallery.links.encode({ ...gallery.state, open: null });
    gallery.state = gallery.links.fit(state, parts.table);
    parts.viewer.close(true);
    if (!onlyRow) await gallery.refresh({ keepsPlace: false });
    openLinked();
  }

  function bind({ table, grid, viewer, toolbar }) {
    byId("tiles").addEventListener("click", (event) => {
      const { tile } = event.target.closest(".tile") ?? {};
      if (!tile) return;
      grid.focused = tile.position;
      if (event.target.closest(".tile-mark")) gallery.ratings.toggleMark(tile.row);
      else viewer.open(tile.position);
    });
    window.addEventListener("rating", (event) => {
      grid.updateRow(event.detail);
      const { state } = gallery;
      const isUsed = (name) => state.facets.has(name) || state.group === name || state.sort?.name === name;
      if (!viewer.isOpen && (isUsed("rating") || isUsed("mark"))) gallery.refresh();
      else if (table.loaded >= table.size) parts.filters.update(new gallery.query.Match(table, state), state);
    });
    window.addEventListener("popstate", followAddress);
    window.addEventListener("hashchange", followAddress);
    gallery.keyboard.listen({ grid, viewer, openDialog: (name) => toolbar.openDialog(name) });
  }

  /** Show the proportions that most images of the first file have. */
  function commonRatio(table) {
    const counts = new Map();
    for (let row = 0; row < table.loaded; row++) {
      const ratio = table.value("width", row) / table.value("height", row);
      if (ratio > 0 && Number.isFinite(ratio)) counts.set(ratio, (counts.get(ratio) ?? 0) + 1);
    }
    const [[ratio] = [1]] = [...counts].sort((a, b) => b[1] - a[1]);
    return Math.min(1.8, Math.max(0.6, ratio));
  }

  async function start() {
    const meta = await gallery.data.load("meta");
    const table = new gallery.data.Table(meta);
    gallery.ratings.open(table);
    const grid = new gallery.Grid(byId("grid"), table);
    const filters = new gallery.Filters(table, byId("filter-sections"), byId("chips"));
    parts = { table, grid, filters, charts: new gallery.Charts(table, byId("charts")), toolbar: new gallery.Toolbar(table, grid) };
    parts.viewer = new gallery.Viewer(table, grid);
    gallery.table = table;
    bind(parts);
    let last = 0;
    let rated = 0;
    await gallery.data.loadRows(table, () => {
      gallery.ratings.apply(rated, table.loaded);
      if (rated === 0) {
        grid.ratio = commonRatio(table);
        filters.build();
      }
      rated = table.loaded;
      if (performance.now() - last < REFRESH_MS) return;
      gallery.refresh({ isLoading: last > 0 }).then(openLinked);
      last = performance.now();
    });
    gallery.links.fit(gallery.state, table);
    filters.build();
    await gallery.dom.pause();
    await gallery.refresh();
    openLinked();
    document.documentElement.dataset.loaded = table.loaded;
  }

  start().catch((error) => {
    fail(error);
    throw error;
  });
})((window.BatchInferGallery ??= {}));
