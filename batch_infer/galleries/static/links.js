// Keep the view in the address: filters, sort order, grouping and the open image, as text after the #.
"use strict";

(function (gallery) {
  const EMPTY = { text: "", sort: null, group: null, view: "images", open: null };

  const emptyState = () => ({ ...EMPTY, facets: new Map(), ranges: new Map() });

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

  /** Drop filters, order and grouping by columns that this gallery lacks. */
  function fit(state, table) {
    const isOpen = table.loaded < table.size; // columns of scores appear while the rows load
    const known = (name) => isOpen || table.columns.has(name);
    for (const filters of [state.facets, state.ranges]) {
      for (const name of filters.keys()) if (!known(name)) filters.delete(name);
    }
    if (state.sort && !known(state.sort.name)) state.sort = null;
    if (state.group && !known(state.group)) state.group = null;
    return state;
  }

  /** Put a state into the address. With `push`, the browser's Back button returns to the state before. */
  function write(state, push = false) {
    const url = `#${encode(state)}`;
    if (url === (window.location.hash || "#")) return;
    if (push) window.history.pushState({ pushed: true }, "", url);
    else window.history.replaceState(window.history.state, "", url);
  }

  gallery.links = { encode, decode, fit, write, emptyState };
})((window.BatchInferGallery ??= {}));
