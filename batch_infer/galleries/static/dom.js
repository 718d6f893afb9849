// Make elements, copy text, and wait. Text enters the page only as text nodes, never as HTML.
"use strict";

(function (gallery) {
  const SVG = "http://www.w3.org/2000/svg";

  /** Make an element. `text` sets its text, `onclick` and the like add listeners, and other keys set attributes. */
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "text") node.textContent = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  /** Make an icon of the sprite in index.html. */
  function icon(name) {
    const svg = document.createElementNS(SVG, "svg");
    const use = document.createElementNS(SVG, "use");
    svg.setAttribute("class", "icon");
    svg.setAttribute("aria-hidden", "true");
    use.setAttribute("href", `#icon-${name}`);
    svg.append(use);
    return svg;
  }

  /** Make a button that shows only an icon. */
  function iconButton(name, label, onclick, className = "") {
    return make("button", { type: "button", class: `icon-button ${className}`, "aria-label": label, title: label, onclick }, icon(name));
  }

  /** Return the open dialog, or the page: what is outside an open dialog is behind it and takes no input. */
  const topmost = () => document.querySelector("dialog[open]") ?? document.body;

  let toastTimer = 0;

  /** Show a short message at the bottom of the page, and announce it to screen readers. */
  function toast(message) {
    const box = document.getElementById("toast");
    if (box.parentNode !== topmost()) topmost().append(box);
    box.textContent = message;
    box.classList.add("is-shown");
    clearTimeout(toastTimer);
    toastTimer = setTimeout(() => box.classList.remove("is-shown"), 2500);
  }

  /** Copy text in browsers that refuse the clipboard to files. Returns whether it worked. */
  function copySelection(text) {
    const { activeElement } = document;
    const area = make("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.querySelector(".pswp--open") ?? document.body).append(area);
    area.focus({ preventScroll: true });
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    activeElement?.focus({ preventScroll: true });
    return isCopied;
  }

  /** Copy text, then show `message`. */
  async function copy(text, message = "Copied") {
    let isCopied = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      isCopied = copySelection(text);
    }
    toast(isCopied ? message : "Copying failed. Select the text and copy it.");
  }

  /** Let the browser paint and handle input before the caller continues. */
  function pause() {
    if (window.scheduler?.yield) return window.scheduler.yield();
    return new Promise((resolve) => setTimeout(resolve, 0));
  }

  /** Call a function when the browser is idle, after at most 100 ms. Safari has no requestIdleCallback: there, after 30 ms. */
  function whenIdle(callback) {
    if (window.requestIdleCallback) window.requestIdleCallback(callback, { timeout: 100 });
    else setTimeout(callback, 30);
  }

  /** Offer text as a file to save. */
  function save(name, text) {
    const url = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    const link = make("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  const reducesMotion = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  gallery.dom = { make, icon, iconButton, toast, copy, pause, whenIdle, save, reducesMotion };
})((window.BatchInferGallery ??= {}));
