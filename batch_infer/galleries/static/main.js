// Start the page: load the data, and show the results again whenever the state changes.
"use strict";

(function (gallery) {
  const REFRESH_MS = 300;
  const byId = (id) => document.getElementById(id);
  let parts = null;
  let leaving = null; // while the browser goes back: the function that ends the wait, and its promise
  let generation = 0;
  let shown = 0; // the generation that the page shows
  let isOutdated = false; // whether a rating may have changed which results are shown while an image was open

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
    const { table, grid, filters, toolbar, charts, viewer } = parts;
    const started = performance.now();
    const number = ++generation;
    isOutdated = false;
    const state = gallery.links.fit(gallery.state, table);
    const { match, rows, starts } = await gallery.query.run(table, state);
    if (number !== generation) return;
    shown = number;
    const view = { rows, starts, isComplete: match.size === table.size, groupName: state.group, sortName: state.sort?.name };
    grid.setView(view, { keepsPlace });
    viewer.setRows(rows);
    toolbar.update(state, view);
    if (state.view === "charts") charts.show(rows);
    filters.showChips(state);
    const later = openLinked();
    if (later || isLoading) return later;
    await gallery.dom.pause();
    if (number !== generation) return;
    filters.update(match, state);
    gallery.lastRefresh = { number, milliseconds: performance.now() - started, rows: rows.length };
    window.dispatchEvent(new CustomEvent("refreshed"));
  };

  /** Change the state and show its results. An image of the address that is not loaded yet does not open any more. */
  gallery.setState = function (changes) {
    const open = parts.viewer.isOpen ? gallery.state.open : null;
    gallery.state = { ...gallery.state, open, ...changes };
    const refreshed = gallery.refresh({ keepsPlace: false });
    gallery.links.writeSoon();
    return refreshed;
  };

  /** Set or remove the filter of a column. `kind` is "facets" or "ranges". */
  gallery.change = function (kind, name, value) {
    const filters = new Map(gallery.state[kind]);
    if (value && (kind === "ranges" || value.size)) filters.set(name, value);
    else filters.delete(name);
    gallery.setState({ [kind]: filters });
  };

  gallery.clearFilters = () => gallery.setState(gallery.links.noFilters());

  const nameOf = (row) => ({ id: parts.table.value("id", row), image: parts.table.value("image_index", row) ?? 0 });

  /** Called by the viewer when it shows a row: put the row into the address. */
  gallery.opened = function (row) {
    const wasOpen = gallery.state.open !== null;
    gallery.state.open = nameOf(row);
    if (leaving) leaving.promise.then(() => gallery.links.write(gallery.state, true));
    else if (wasOpen) gallery.links.writeSoon();
    else gallery.links.write(gallery.state, true);
  };

  /** Go back to the address before an image was opened, without following it. */
  function leave() {
    let end = null;
    const promise = new Promise((resolve) => (end = resolve));
    leaving = { end, promise };
    window.history.back();
  }

  /** Called by the viewer when it has closed: remove the row from the address, and focus its tile. */
  gallery.closed = async function (row) {
    const { grid, viewer } = parts;
    if (gallery.state.open !== null) {
      gallery.state.open = null;
      if (!leaving && window.history.state?.pushed) leave();
      else if (!leaving) gallery.links.write(gallery.state);
    }
    if (isOutdated) await gallery.refresh();
    if (viewer.isOpen || gallery.state.view !== "images") return;
    const position = grid.view.rows.indexOf(row);
    grid.focus(position < 0 ? grid.focused : position);
  };

  /** Open a row that the filters leave out, without them. */
  gallery.openRow = async function (row) {
    await parts.viewer.close(true);
    await gallery.setState({ ...gallery.links.noFilters(), open: nameOf(row) });
  };

  /**
   * Open the row of the address if it is among the results that the page shows. Once all rows are loaded, clear the
   * filters if they leave it out, and return a promise.
   */
  function openLinked() {
    const { table, grid, viewer } = parts;
    const { open } = gallery.state;
    if (!open || viewer.isOpen || shown !== generation) return null;
    const row = table.find(open.id, open.image);
    const position = row < 0 ? -1 : grid.view.rows.indexOf(row);
    if (position >= 0) viewer.open(position);
    else if (grid.view.isComplete) return gallery.setState(row < 0 ? { open: null } : { ...gallery.links.noFilters(), open });
    return null;
  }

  /** Follow the address after Back, Forward, or an edit by hand. */
  async function followAddress() {
    if (leaving) {
      leaving.end();
      leaving = null;
      gallery.links.write({ ...gallery.state, open: null }); // the view may have changed while the image was open
      return;
    }
    const { encode, decode, fit } = gallery.links;
    const state = fit(decode(window.location.hash), parts.table);
    if (encode(state) === encode(gallery.state)) return;
    const onlyRow = encode({ ...state, open: null }) === encode({ ...gallery.state, open: null });
    gallery.state = state;
    await parts.viewer.close(true);
    if (onlyRow && !isOutdated) await openLinked();
    else await gallery.refresh({ keepsPlace: onlyRow });
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
      const isRegrouped = isUsed("rating") || isUsed("mark");
      isOutdated ||= isRegrouped && viewer.isOpen;
      if (isRegrouped && !viewer.isOpen) gallery.refresh();
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
      gallery.refresh({ isLoading: last > 0 });
      last = performance.now();
    });
    filters.build();
    await gallery.dom.pause();
    await gallery.refresh();
    document.documentElement.dataset.loaded = table.loaded;
  }

  start().catch((error) => {
    fail(error);
    throw error;
  });
})((window.BatchInferGallery ??= {}));
