// Show one image large, with the panel of its values beside it. PhotoSwipe does zooming, swiping and loading.
"use strict";

(function (gallery) {
  const { make, icon, reducesMotion } = gallery.dom;
  const PANEL_WIDTH = 408;
  const NARROW = 760;
  const SHEET = 0.5; // share of the height that the panel takes on narrow screens
  const UNKNOWN_SIDE = 512;
  const MOST_ENLARGED = 4;
  const FLAGGED = "The safety checker flagged this image.";

  /** Return the zoom level that fills the area, which enlarges small images at most MOST_ENLARGED times. */
  function enlarge({ fit, panAreaSize, elementSize }) {
    const filling = Math.min(panAreaSize.x / elementSize.x, panAreaSize.y / elementSize.y);
    return Math.max(fit, Math.min(filling, MOST_ENLARGED));
  }

  class Viewer {
    constructor(table, grid) {
      this.table = table;
      this.grid = grid;
      this.images = new Map();
      this.hasPanel = gallery.storage.read("batch-infer-gallery:panel") !== "closed";
      this.panel = new gallery.Panel(table, {
        rate: (row, value) => gallery.ratings.rate(row, value),
        mark: (row) => gallery.ratings.toggleMark(row),
        open: (row) => this.goTo(row),
      });
      window.addEventListener("rating", (event) => this.isOpen && event.detail === this.row && this.showPanel());
    }

    get isOpen() {
      return Boolean(this.pswp);
    }

    /** Open the row at a position of the grid's view. */
    open(position) {
      if (this.isOpen || position < 0) return;
      this.rows = this.grid.view.rows;
      this.isQuiet = false;
      this.indices = new Set();
      this.ended = new Promise((resolve) => (this.resolveEnded = resolve));
      this.pswp = new PhotoSwipe({
        index: position,
        loop: false,
        bgOpacity: 1,
        wheelToZoom: true,
        initialZoomLevel: enlarge,
        returnFocus: false,
        escKey: false,
        pinchToClose: false,
        closeOnVerticalDrag: false,
        tapAction: "toggle-controls",
        bgClickAction: "close",
        mainClass: "viewer",
        showHideAnimationType: "none",
        zoomAnimationDuration: reducesMotion() ? 0 : 200,
        getViewportSizeFn: () => this.imageArea(),
        paddingFn: () => ({ top: 56, bottom: 24, left: 24, right: 24 }),
        arrowPrevTitle: "Previous",
        arrowNextTitle: "Next",
        closeTitle: "Close (Esc)",
        zoomTitle: "Zoom (z)",
      });
      this.bind(position);
      this.pswp.init();
    }

    bind(position) {
      const { pswp } = this;
      pswp.addFilter("numItems", () => this.rows.length);
      pswp.addFilter("itemData", (_, index) => this.slide(this.rows[index]));
      pswp.addFilter("contentErrorElement", () => this.message("The image cannot be loaded. Its file may have been moved or removed."));
      pswp.on("contentLoad", (event) => this.loadContent(event));
      pswp.on("uiRegister", () => this.addPanelButton());
      pswp.on("afterInit", () => this.start());
      pswp.on("change", () => this.change());
      pswp.on("destroy", () => this.end());
      this.row = this.rows[position];
    }

    start() {
      const { element } = this.pswp;
      element.setAttribute("aria-label", "Image and its details");
      element.setAttribute("aria-modal", "true");
      element.append(this.panel.node);
      element.classList.toggle("has-panel", this.hasPanel);
      document.getElementById("app").inert = true;
      this.change();
    }

    end() {
      document.getElementById("app").inert = false;
      this.pswp = null;
      this.images.clear();
      if (!this.isQuiet) gallery.closed(this.row);
      this.resolveEnded();
    }

    /** Close the view. With `isQuiet`, the address stays as it is. The promise resolves when another image can be opened. */
    close(isQuiet = false) {
      const { pswp } = this;
      if (!pswp) return Promise.resolve();
      this.isQuiet ||= isQuiet;
      if (!pswp.opener.isOpen && !pswp.isDestroying) pswp.on("openingAnimationEnd", () => pswp.isDestroying || pswp.destroy());
      else if (!pswp.isDestroying) pswp.destroy();
      return this.ended;
    }

    /** Continue in the rows of another view, if it has the open one. */
    setRows(rows) {
      const { pswp } = this;
      const position = pswp && !pswp.isDestroying ? rows.indexOf(this.row) : -1;
      if (position < 0) return;
      const { currIndex: former } = pswp;
      const isSame = (step) => this.rows[former + step] === rows[position + step];
      const isKept = position === former && isSame(-1) && isSame(1);
      this.rows = rows;
      if (!isKept) this.replaceNeighbours(position);
      pswp.dispatch("change");
    }

    /** Move the open slide to another position, and load the slides before and after it again. */
    replaceNeighbours(position) {
      const { pswp } = this;
      for (const index of this.indices) pswp.contentLoader.removeByIndex(index);
      this.indices.clear();
      pswp.potentialIndex += position - pswp.currIndex; // differs from currIndex during a swipe
      pswp.currIndex = position;
      pswp.currSlide.index = pswp.currSlide.content.index = position;
      const [before, , after] = pswp.mainScroll.itemHolders;
      pswp.setContent(before, position - 1, true);
      pswp.setContent(after, position + 1, true);
    }

    /** Called for another slide, and also when the content of a slide was replaced. */
    change() {
      this.row = this.rows[this.pswp.currIndex];
      gallery.opened(this.row);
      this.showPanel();
      if (!this.images.has(this.row)) this.loadDetails(this.row);
    }

    /** Load the details of a row, which name its image file, then show both. */
    async loadDetails(row) {
      try {
        const details = await gallery.data.loadDetails(this.table, row);
        this.images.set(row, details);
        if (this.row === row) this.panel.failure = null;
      } catch (error) {
        this.images.set(row, {});
        this.panel.failure = error.message;
      }
      if (!this.isOpen || this.row !== row) return;
      this.pswp.refreshSlideContent(this.pswp.currIndex);
      this.showPanel();
    }

    showPanel() {
      const position = this.rows.indexOf(this.row);
      const place = `${gallery.labels.count(position + 1)} of ${gallery.labels.count(this.rows.length)}`;
      const details = this.images.get(this.row);
      this.panel.show(this.row, details && Object.keys(details).length ? details : null, place, this.siblings());
    }

    /** Return the rows of the same prompt, in the order of the table. */
    siblings() {
      const { codes } = this.table.get("prompt");
      const code = codes[this.row];
      const rows = [];
      for (let row = 0; code >= 0 && row < this.table.loaded; row++) if (codes[row] === code) rows.push(row);
      return rows;
    }

    /** Show another row. If the filters leave it out, they are cleared first. */
    async goTo(row) {
      const position = this.rows.indexOf(row);
      if (position >= 0) this.pswp.goTo(position);
      else await gallery.openRow(row);
    }

    slide(row) {
      const thumb = this.table.thumbs[row];
      const details = this.images.get(row);
      const path = details?._image ?? (thumb ? `thumbs/${thumb}` : null);
      const isImage = path && !gallery.tile.isHidden(this.table, row) && !this.isWithheld(row, details);
      const sides = { width: this.table.value("width", row) ?? UNKNOWN_SIDE, height: this.table.value("height", row) ?? UNKNOWN_SIDE };
      const text = (this.table.value("prompt", row) ?? "").slice(0, 300);
      return isImage ? { ...sides, src: path, msrc: `thumbs/${thumb}`, alt: text, row } : { type: "notice", row };
    }

    /** Whether the page must not show an image: it is a black one, or flagged and not linked by the details. */
    isWithheld(row, details) {
      return this.table.isBlanked(row) || Boolean(details && gallery.tile.isFlagged(this.table, row) && !details._image);
    }

    /** Make the content of slides without an image: a reason, or a flagged image that can be shown. */
    loadContent(event) {
      const { content } = event;
      this.indices.add(content.index);
      if (content.data.type !== "notice") return;
      event.preventDefault();
      const { row } = content.data;
      const isHidden = gallery.tile.isHidden(this.table, row);
      const details = this.images.get(row);
      const hasNoImage = gallery.tile.isFlagged(this.table, row) && !this.table.thumbs[row] && !this.table.problems.has(row);
      const isNotice = isHidden || hasNoImage || this.isWithheld(row, details);
      content.element = isNotice ? this.flagged(row, isHidden, details) : this.message(this.table.reason(row));
    }

    message(text) {
      return make("div", { class: "notice" }, make("div", { class: "notice-box" }, icon("alert"), make("p", { text })));
    }

    flagged(row, isHidden, details) {
      const thumb = this.table.thumbs[row];
      const image = thumb ? make("img", { class: "notice-blur", src: `thumbs/${thumb}`, alt: "" }) : null;
      const file = details?.generated_image;
      const where = file ? `The image is not part of this gallery. Its file is ${file} in the output folder.` : "The image was not stored.";
      let words = FLAGGED;
      if (this.table.isBlanked(row)) words = `${FLAGGED} A black image is stored in its place.`;
      else if (!isHidden && details) words = where;
      const box = make("div", { class: "notice-box" }, icon("eye-off"), make("strong", { text: "Flagged" }), make("p", { text: words }));
      if (isHidden) box.append(make("button", { type: "button", class: "button", text: "Show image", onclick: () => this.reveal(row) }));
      return make("div", { class: "notice" }, image, box);
    }

    reveal(row) {
      gallery.tile.reveal(row);
      this.grid.updateRow(row);
      this.pswp.refreshSlideContent(this.rows.indexOf(row));
      this.showPanel();
      this.pswp.element.focus();
    }

    addPanelButton() {
      this.pswp.ui.registerElement({
        name: "details",
        order: 9,
        isButton: true,
        title: "Details (i)",
        onInit: (node) => node.append(icon("info")),
        onClick: () => this.togglePanel(),
      });
    }

    togglePanel() {
      this.hasPanel = !this.hasPanel;
      gallery.storage.write("batch-infer-gallery:panel", this.hasPanel ? "open" : "closed");
      this.pswp.element.classList.toggle("has-panel", this.hasPanel);
      this.pswp.updateSize(true);
    }

    /** Return the size of the area that the panel leaves. */
    imageArea() {
      const { innerWidth: width, innerHeight: height } = window;
      if (!this.hasPanel) return { x: width, y: height };
      return width < NARROW ? { x: width, y: Math.round(height * (1 - SHEET)) } : { x: width - PANEL_WIDTH, y: height };
    }
  }

  gallery.Viewer = Viewer;
})((window.BatchInferGallery ??= {}));
