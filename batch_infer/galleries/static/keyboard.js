// Keys of the page. Those of an open image are handled here too, except zooming and previous or next.
"use strict";

(function (gallery) {
  const MOVES = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };

  const isTyping = (target) => target.closest?.("input, select, textarea, [contenteditable]");

  /** Rate or mark a row if the key does. Returns whether it does. A key that is held down counts once. */
  function rateByKey({ key, repeat }, row) {
    if (row === undefined || row === null) return false;
    if (repeat) return /^[0-5m]$/.test(key);
    if (/^[0-5]$/.test(key)) gallery.ratings.rate(row, key === "0" ? gallery.ratings.ratingOf(row) : Number(key));
    else if (key === "m") gallery.ratings.toggleMark(row);
    else return false;
    return true;
  }

  function moveInGrid(event, grid) {
    const step = MOVES[event.key];
    if (step !== undefined) {
      const last = grid.view.rows.length - 1;
      grid.focus(step === -Infinity ? 0 : step === Infinity ? last : grid.focused + step);
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      grid.focus(grid.layout.neighbour(grid.focused, event.key === "ArrowUp" ? -1 : 1));
    } else if (event.key === "PageUp" || event.key === "PageDown") {
      grid.focusPage(event.key === "PageUp" ? -1 : 1);
    } else return false;
    return true;
  }

  function inViewer(event, viewer) {
    if (event.key === "Escape") viewer.close();
    else if (event.key === "i") viewer.togglePanel();
    else return rateByKey(event, viewer.row);
    return true;
  }

  function inPage(event, grid, openDialog) {
    const { tile } = event.target.closest?.(".tile") ?? {};
    if (event.key === "/") document.getElementById("search").focus();
    else if (event.key === "?") openDialog("help");
    else if (tile && moveInGrid(event, grid)) return true;
    else if (!tile && event.target === document.body && event.key.startsWith("Arrow") && grid.view.rows.length) grid.focus(grid.focused);
    else return rateByKey(event, tile?.row);
    return true;
  }

  function listen({ grid, viewer, openDialog }) {
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
      if (document.querySelector("dialog[open]")) return;
      if (isTyping(event.target)) {
        if (event.key === "Escape" && event.target.id === "search") event.target.blur();
        return;
      }
      const isHandled = viewer.isOpen ? inViewer(event, viewer) : inPage(event, grid, openDialog);
      if (isHandled) event.preventDefault();
    });
  }

  gallery.keyboard = { listen };
})((window.BatchInferGallery ??= {}));
