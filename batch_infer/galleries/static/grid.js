// Show the results in a grid. Only the tiles in view exist, and they are reused while the page scrolls.
"use strict";

(function (gallery) {
  const { Layout, SIZES } = gallery.layout;
  const { Tile, GroupHeader } = gallery.tile;
  const MAX_HEIGHT = 12e6; // browsers limit the height of an element to 17 or 33 million px
  const OVERSCAN = 0.6; // of the height of the view, above and below it
  const FAST = 6; // heights of the view per second: faster than this, tiles are blank
  const SPEED_MS = 120;
  const SETTLED_MS = 90;

  class Grid {
    constructor(scroller, table) {
      this.scroller = scroller;
      this.table = table;
      this.canvas = scroller.querySelector("#tiles");
      this.size = gallery.storage.read("batch-infer-gallery:size") ?? "medium";
      if (!(this.size in SIZES)) this.size = "medium";
      this.used = new Map();
      this.free = { tile: [], header: [] };
      this.captionColumns = new Map();
      this.focused = 0;
      this.offset = 0; // px by which the content is shifted, if it is higher than MAX_HEIGHT
      this.lastTop = 0;
      this.view = { rows: new Uint32Array(0), starts: null };
      this.frame = 0;
      this.isLoadScheduled = false;
      this.samples = [];
      this.ratio = 1;
      this.scrollTop = 0; // read only when the layout is clean: reading it would force a layout otherwise
      scroller.addEventListener("scroll", () => this.schedule(), { passive: true });
      this.canvas.addEventListener("focusout", () => this.schedule()); // the tile may be out of view
      new ResizeObserver(() => this.measure()).observe(scroller);
    }

    /** Show other results. With `keepsPlace`, the page does not scroll to the top. */
    setView(view, { keepsPlace }) {
      this.view = view;
      this.captionColumns.clear();
      const hadFocus = this.canvas.contains(document.activeElement);
      if (!keepsPlace) {
        this.focused = 0;
        this.offset = 0;
        this.lastTop = 0;
        this.scrollTop = 0;
        this.samples = [];
        this.scroller.scrollTop = 0;
      }
      this.reassign();
      this.focused = Math.min(this.focused, Math.max(0, view.rows.length - 1));
      this.relayout();
      if (hadFocus && !this.hasFocus()) this.focus(this.focused);
    }

    /** Whether the keyboard focus is in the tile at `focused`. */
    hasFocus() {
      return this.used.get(this.focused)?.node.contains(document.activeElement) ?? false;
    }

    setSize(size) {
      this.size = size;
      gallery.storage.write("batch-infer-gallery:size", size);
      this.relayout();
      this.reach(this.focused);
    }

    /** Read the size of the view, after the window was resized or the grid was hidden or shown. */
    measure() {
      this.viewWidth = this.canvas.clientWidth;
      this.viewHeight = this.scroller.clientHeight;
      this.scrollTop = this.scroller.scrollTop;
      this.relayout();
    }

    relayout() {
      if (!this.viewWidth) return;
      const { rows, starts } = this.view;
      this.layout = new Layout({ count: rows.length, starts, width: this.viewWidth, size: this.size, ratio: this.ratio });
      this.canvas.style.height = `${Math.min(this.layout.total, MAX_HEIGHT)}px`;
      this.canvas.style.setProperty("--tile-width", `${this.layout.width}px`);
      this.canvas.style.setProperty("--tile-height", `${this.layout.height}px`);
      this.canvas.style.setProperty("--image-height", `${this.layout.imageHeight}px`);
      this.canvas.dataset.size = this.size;
      this.update();
    }

    schedule() {
      this.frame ||= requestAnimationFrame(() => {
        this.scrollTop = this.scroller.scrollTop;
        this.update();
      });
    }

    /** Return the height in the layout that is at the top of the view. Small steps are exact, large ones in proportion. */
    computeTop() {
      const { scrollTop, viewHeight } = this;
      const excess = this.layout.total - MAX_HEIGHT;
      const end = MAX_HEIGHT - viewHeight;
      if (excess <= 0 || scrollTop <= 0) this.offset = 0;
      else if (scrollTop >= end) this.offset = excess;
      else if (Math.abs(scrollTop - this.lastTop) > 3 * viewHeight) this.offset = Math.round((scrollTop / end) * excess);
      return scrollTop + this.offset;
    }

    /** Return the speed of scrolling over the last SPEED_MS, in px per ms. */
    measureSpeed(top) {
      const now = performance.now();
      this.samples = this.samples.filter(({ time }) => now - time < SPEED_MS);
      this.samples.push({ time: now, top });
      return Math.abs(top - this.samples[0].top) / SPEED_MS;
    }

    update() {
      cancelAnimationFrame(this.frame);
      this.frame = 0;
      if (!this.layout) return;
      const height = this.viewHeight;
      const top = this.computeTop();
      const isFast = this.measureSpeed(top) > (FAST * height) / 1000;
      this.lastTop = this.scrollTop;
      const { positions, groups } = this.layout.visible(top - OVERSCAN * height, top + (1 + OVERSCAN) * height);
      if (this.hasFocus() && !positions.includes(this.focused)) positions.push(this.focused); // a hidden tile would lose the focus
      const needed = new Set([...positions, ...groups.map((group) => `g${group}`)]);
      for (const [key, item] of this.used) if (!needed.has(key)) this.release(key, item);
      for (const position of positions) this.showTile(position, isFast);
      for (const group of groups) this.showHeader(group);
      if (!isFast) this.loadSoon();
      clearTimeout(this.settling);
      this.settling = setTimeout(() => this.settle(), SETTLED_MS);
    }

    /** Fill the tiles that fast scrolling left blank, and prepare the tiles for the keyboard and for screen readers. */
    settle() {
      this.keepReachable();
      for (const [key, item] of this.used) if (item.isBlank) this.fill(item, key);
      this.loadImages();
      const items = [...this.used].map(([key, item]) => ({ item, order: item.kind === "tile" ? key : this.view.starts[Number(key.slice(1))] - 0.5 }));
      const nodes = items.sort((a, b) => a.order - b.order).map(({ item }) => item.node);
      const isOrdered = nodes.every((node, i) => i === 0 || nodes[i - 1].compareDocumentPosition(node) & Node.DOCUMENT_POSITION_FOLLOWING);
      if (isOrdered) return;
      const active = nodes.findIndex((node) => node.contains(document.activeElement)); // would lose the focus if moved
      nodes.forEach((node, i) => {
        if (i < active) this.canvas.insertBefore(node, nodes[active]);
        else if (i > active) this.canvas.append(node);
      });
    }

    /** Let Tab reach the first tile in view if the one that it reached was scrolled away. */
    keepReachable() {
      if (this.used.has(this.focused)) return;
      const top = this.scrollTop + this.offset;
      const positions = [...this.used.keys()].filter((key) => typeof key === "number").sort((a, b) => a - b);
      const isBelow = (height) => positions.find((position) => this.layout.locate(position).y >= height);
      const first = isBelow(top) ?? isBelow(top - this.layout.height) ?? positions[0];
      if (first === undefined) return;
      this.focused = first;
      this.used.get(first).button.tabIndex = 0;
    }

    showTile(position, isFast) {
      let tile = this.used.get(position);
      if (!tile) {
        tile = this.take(position, "tile", () => new Tile());
        tile.setBlank(true);
      }
      if (tile.isBlank && !isFast) this.fill(tile, position);
      tile.button.tabIndex = position === this.focused ? 0 : -1;
      const { x, y } = this.layout.locate(position);
      tile.move(x, Math.min(y - this.offset, MAX_HEIGHT)); // the focused tile may be far below the view
    }

    /** Load the images once the browser is idle: loading at once would delay the tiles and the counts. */
    loadSoon() {
      if (this.isLoadScheduled) return;
      this.isLoadScheduled = true;
      gallery.dom.whenIdle(() => {
        this.isLoadScheduled = false;
        this.loadImages();
      });
    }

    loadImages() {
      for (const item of this.used.values()) if (item.needsImage) item.loadImage();
    }

    showHeader(group) {
      const header = this.used.get(`g${group}`) ?? this.take(`g${group}`, "header", () => new GroupHeader());
      const size = this.view.starts[group + 1] - this.view.starts[group];
      header.show(this.nameGroup(group), gallery.labels.plural(size, "result"));
      header.move(0, this.layout.tops[group] - this.offset);
    }

    /** Name the value that the results of a group share. */
    nameGroup(group) {
      const column = this.table.get(this.view.groupName);
      const cell = column.value(this.view.rows[this.view.starts[group]]);
      return cell === null ? gallery.labels.nothing(column) : gallery.labels.value(column, cell) || gallery.labels.EMPTY;
    }

    /** Return the two lines of a tile, which in a group of one prompt are the values in which its results differ, and its group. */
    describe(row, position) {
      const { captions } = gallery;
      const prompt = this.table.value("prompt", row) || this.table.value("id", row);
      const name = captions.plain(this.table, row, this.view.sortName);
      if (!this.view.starts) return { title: prompt, caption: name, groupName: "" };
      const group = gallery.lastAtMost(this.view.starts.subarray(0, this.view.starts.length - 1), position);
      const groupName = this.nameGroup(group);
      if (this.view.groupName !== "prompt") {
        const column = this.table.get(this.view.groupName);
        return { title: prompt, caption: name, groupName: `${gallery.labels.shortLabel(column)} ${groupName}` };
      }
      if (!this.captionColumns.has(group)) {
        const rows = this.view.rows.subarray(this.view.starts[group], this.view.starts[group + 1]);
        this.captionColumns.set(group, captions.differing(this.table, rows, this.view.groupName));
      }
      const values = captions.join(this.captionColumns.get(group), row);
      return { title: values || prompt, caption: name, groupName };
    }

    take(key, kind, create) {
      const item = this.free[kind].pop() ?? create();
      item.kind = kind;
      item.node.hidden = false;
      if (!item.node.isConnected) this.canvas.append(item.node);
      this.used.set(key, item);
      return item;
    }

    release(key, item) {
      this.used.delete(key);
      item.node.hidden = true;
      item.clearImage?.();
      this.free[item.kind].push(item);
    }

    /** Show the new view in the tiles at the same positions. Those that show the same row keep their image. */
    reassign() {
      for (const [key, item] of [...this.used]) {
        if (item.kind === "tile" && key < this.view.rows.length) this.fill(item, key);
        else this.release(key, item);
      }
    }

    fill(tile, position) {
      const row = this.view.rows[position];
      tile.show(this.table, { row, position, total: this.view.rows.length, ...this.describe(row, position) });
    }

    /** Scroll so that a tile is in view. */
    reach(position) {
      if (!this.layout || position >= this.view.rows.length) return;
      const { y } = this.layout.locate(position);
      const height = this.viewHeight;
      const top = this.scrollTop + this.offset;
      if (y >= top && y + this.layout.height <= top + height) return;
      const wanted = y < top ? y - 60 : y + this.layout.height + 16 - height;
      const excess = Math.max(0, this.layout.total - MAX_HEIGHT);
      if (Math.abs(wanted - top) > height) this.offset = Math.round((excess * Math.max(0, wanted)) / this.layout.total);
      this.scroller.scrollTop = Math.max(0, wanted - this.offset);
      this.scrollTop = this.scroller.scrollTop;
      this.lastTop = this.scrollTop;
      this.samples = [];
      this.update();
    }

    /** Move the keyboard focus to a tile. */
    focus(position) {
      if (!this.view.rows.length) return;
      this.focused = Math.max(0, Math.min(position, this.view.rows.length - 1));
      this.reach(this.focused);
      this.update();
      this.used.get(this.focused)?.button.focus({ preventScroll: true });
    }

    /** Move the keyboard focus up (-1) or down (1) by the rows of tiles that fit into the view. */
    focusPage(direction) {
      let position = this.focused;
      const rows = Math.max(1, Math.floor(this.viewHeight / this.layout.pitch));
      for (let row = 0; row < rows; row++) position = this.layout.neighbour(position, direction);
      this.focus(position);
    }

    /** Show a changed rating, or that a flagged image may be seen. */
    updateRow(row) {
      for (const item of this.used.values()) {
        if (item.kind !== "tile" || item.row !== row) continue;
        item.showNote();
        item.showRating();
      }
    }
  }

  gallery.Grid = Grid;
})((window.BatchInferGallery ??= {}));
