// Keep the view in the address: filters, sort order, grouping and the open image, as text after the #.
"use strict";

(function (gallery) {
  const EMPTY = { text: "", sort: null, group: null, view: "images", open: null };

  const WRITE_MS = 400; // Safari refuses more than 100 changes of the address in 30 seconds
  let timer = null; // while it runs, changes of the address wait
  let isDue = false;

  const noFilters = () => ({ text: "", facets: new Map(), ranges: new Map() });

  const emptyState = () => ({ ...EMPTY, ...noFilters() });

  /** Return the text after the # for a state. Default values are left out. */
  function encode(state) {
    const parts = new URLSearchParams();
    if (state.text) parts.set("q", state.text);
    for (const [name, keys] of state.facets) for (const key of keys) key === null ? parts.append("none", name) : parts.append(`is.${name}`, key);
    for (const [name, { min, max }] of state.ranges) {
      if (min > -Infinity) parts.set(`min.${name}`, min);
      if (max < Infinity) parts.set(`max.${name}`, max);
    }
    if (state.sort) parts.set("sort", `${state.sort.descending ? "-" : ""}${state.sort.name}`);
    if (state.group) parts.set("group", state.group);
    if (state.view !== "images") parts.set("view", state.view);
    if (state.open) {
      parts.set("row", state.open.id);
      if (state.open.image) parts.set("image", state.open.image);
    }
    return parts.toString();
  }

  function setRange(state, name, side, value) {
    const number = Number(value);
    if (value === "" || Number.isNaN(number)) return;
    const range = state.ranges.get(name) ?? { min: -Infinity, max: Infinity };
    state.ranges.set(name, { ...range, [side]: number });
  }

  function addKey(state, name, key) {
    state.facets.set(name, (state.facets.get(name) ?? new Set()).add(key));
  }

  /** Return the state of a link. Unknown parts are ignored. */
  function decode(hash) {
    const state = emptyState();
    const parts = new URLSearchParams(hash.replace(/^#/, ""));
    for (const [part, value] of parts) {
      const [kind, ...rest] = part.split(".");
      const name = rest.join(".");
      if (part === "q") state.text = value;
      else if (part === "none") addKey(state, value, null);
      else if (part === "group") state.group = value;
      else if (part === "view" && value === "charts") state.view = value;
      else if (part === "sort") state.sort = { name: value.replace(/^-/, ""), descending: value.startsWith("-") };
      else if (kind === "is" && name) addKey(state, name, value);
      else if ((kind === "min" || kind === "max") && name) setRange(state, name, kind, value);
    }
    if (parts.has("row")) state.open = { id: parts.get("row"), image: Math.max(0, Number(parts.get("image")) || 0) };
    return state;
  }

  const hasValues = (column) => column.codes instanceof Uint8Array;
  const hasNumbers = (column) => Boolean(column.numbers);
  const hasGroups = (column) => Boolean(column.codes);
  const hasOrder = (column) => hasNumbers(column) || hasGroups(column);

  /** Drop filters, order and grouping by columns that this gallery lacks, or whose kind does not allow them. */
  function fit(state, table) {
    const isLoading = table.loaded < table.size; // columns of scores appear while the rows load
    const fits = (name, test) => (table.columns.has(name) ? test(table.get(name)) : isLoading);
    for (const name of state.facets.keys()) if (!fits(name, hasValues)) state.facets.delete(name);
    for (const name of state.ranges.keys()) if (!fits(name, hasNumbers)) state.ranges.delete(name);
    if (state.sort && !fits(state.sort.name, hasOrder)) state.sort = null;
    if (state.group && !fits(state.group, hasGroups)) state.group = null;
    return state;
  }

  function put(state, push = false) {
    const url = `#${encode(state)}`;
    if (url === (window.location.hash || "#")) return;
    try {
      if (push) window.history.pushState({ pushed: true }, "", url);
      else window.history.replaceState(window.history.state, "", url);
    } catch (error) {
      if (error.name !== "SecurityError") throw error; // too many changes: the next one has these too
    }
  }

  /** Put a state into the address now. With `push`, the browser's Back button returns to the state before. */
  function write(state, push = false) {
    if (push && timer !== null) put({ ...state, open: null });
    clearTimeout(timer);
    timer = null;
    put(state, push);
  }

  /** Put the state of the page into the address, at most once per WRITE_MS. */
  function writeSoon() {
    isDue = timer !== null;
    if (isDue) return;
    put(gallery.state);
    timer = setTimeout(() => {
      timer = null;
      if (isDue) writeSoon();
    }, WRITE_MS);
  }

  gallery.links = { encode, decode, fit, write, writeSoon, emptyState, noFilters };
})((window.BatchInferGallery ??= {}));
