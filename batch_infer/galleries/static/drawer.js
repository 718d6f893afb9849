// The drawer of filters in narrow windows. In wide ones, the filters are beside the grid.
"use strict";

(function (gallery) {
  const NARROW = "(max-width: 900px)"; // as in filters.css
  const byId = (id) => document.getElementById(id);

  /** Open or close the drawer. While it is open, the rest of the page takes no input. */
  function setOpen(isOpen) {
    const hadFocus = byId("filters").contains(document.activeElement);
    byId("filters").classList.toggle("is-open", isOpen);
    byId("filters-button").setAttribute("aria-expanded", isOpen);
    byId("scrim").hidden = !isOpen;
    for (const part of document.querySelectorAll(".topbar, .main")) part.inert = isOpen;
    if (isOpen) byId("filters-close").focus();
    else if (hadFocus || document.activeElement === document.body) byId("filters-button").focus();
  }

  const isOpen = () => byId("filters").classList.contains("is-open");

  function bind() {
    byId("filters-button").addEventListener("click", () => setOpen(!isOpen()));
    for (const id of ["filters-close", "scrim", "filters-done"]) byId(id).addEventListener("click", () => setOpen(false));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && isOpen() && !document.querySelector("dialog[open]")) setOpen(false);
    });
    window.matchMedia(NARROW).addEventListener("change", () => isOpen() && setOpen(false));
  }

  gallery.drawer = { bind };
})((window.BatchInferGallery ??= {}));
