// Apply the chosen colour scheme before the page is painted.
"use strict";

(function (gallery) {
  const KEY = "batch-infer-gallery:theme";
  const NAMES = ["auto", "light", "dark"];

  /** Read a value of localStorage, or return null where the browser refuses it. */
  function read(key) {
    try {
      return window.localStorage.getItem(key);
    } catch {
      return null;
    }
  }

  /** Write a value to localStorage. Returns false where the browser refuses it or is out of space. */
  function write(key, value) {
    try {
      window.localStorage.setItem(key, value);
      return true;
    } catch {
      return false;
    }
  }

  function current() {
    const name = read(KEY);
    return NAMES.includes(name) ? name : "auto";
  }

  function apply(name) {
    if (name === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.dataset.theme = name;
  }

  gallery.storage = { read, write };
  gallery.theme = {
    current,
    choose(name) {
      write(KEY, name);
      apply(name);
      window.dispatchEvent(new Event("themechange"));
    },
  };
  apply(current());
})((window.BatchInferGallery ??= {}));
