// One tile of the grid. A tile is reused for other results while the page scrolls.
"use strict";

(function (gallery) {
  const { make, icon, iconButton } = gallery.dom;
  const SHOWN_PROMPT = 160;
  const revealed = new Set();

  const isFlagged = (table, row) => table.value("status", row) === "flagged" || table.value("nsfw_content_detected", row) === true;

  /** Whether the image of a row is hidden until the reader reveals it. */
  function isHidden(table, row) {
    return isFlagged(table, row) && Boolean(table.thumbs[row]) && !revealed.has(row);
  }

  /** Make an element whose text node is reused, since new text nodes are garbage while the page scrolls. */
  function textSpan(className) {
    const span = make("span", { class: className, dir: "auto" });
    span.append(document.createTextNode(""));
    return span;
  }

  class Tile {
    constructor() {
      // Chromium keeps the last 1,000 decoded images of img elements, 250 MB at 256 px. It does not keep those of a canvas.
      this.canvas = make("canvas", {});
      this.surface = this.canvas.getContext("bitmaprenderer");
      this.image = make("img", { alt: "", draggable: "false" });
      this.image.addEventListener("load", () => this.paint());
      this.image.addEventListener("error", () => this.fail());
      this.note = textSpan("tile-note");
      this.badge = textSpan("tile-badge");
      this.stars = textSpan("tile-stars");
      this.prompt = textSpan("tile-prompt");
      this.meta = textSpan("tile-meta");
      const picture = make("span", { class: "tile-picture" }, this.canvas, this.note, this.badge, this.stars);
      this.button = make("button", { type: "button", class: "tile-open", tabindex: "-1" }, picture);
      this.button.append(make("span", { class: "tile-text" }, this.prompt, this.meta));
      this.mark = iconButton("mark", "Mark", null, "tile-mark");
      this.mark.tabIndex = -1;
      this.node = make("div", { class: "tile", role: "listitem" }, this.button, this.mark);
      this.node.tile = this;
    }

    /** Show a row. `title` and `caption` are the lines below the image, and `total` is the number of tiles of the view. */
    show(table, { row, position, total, title, caption, groupName }) {
      if (this.row !== row) this.clearImage();
      if (this.isBlank) this.setBlank(false);
      this.row = row;
      this.position = position;
      this.table = table;
      this.groupName = groupName.slice(0, SHOWN_PROMPT);
      this.node.setAttribute("aria-posinset", position + 1);
      this.node.setAttribute("aria-setsize", total);
      this.node.dataset.status = table.value("status", row) ?? "";
      this.prompt.firstChild.data = title.slice(0, SHOWN_PROMPT);
      this.meta.firstChild.data = caption;
      this.showNote();
      this.showRating();
    }

    /** Show nothing, while the page scrolls too fast to read. */
    setBlank(isBlank) {
      this.isBlank = isBlank;
      this.node.classList.toggle("is-blank", isBlank);
      if (isBlank) this.row = -1;
    }

    /** Say why there is no image, or that it is flagged. */
    showNote() {
      const status = this.table.value("status", this.row);
      const hidden = isHidden(this.table, this.row);
      const thumb = this.table.thumbs[this.row];
      this.node.classList.toggle("is-hidden", hidden);
      this.node.classList.toggle("has-no-image", !thumb);
      const badge = status === "ok" ? (hidden ? "flagged" : "") : (status ?? "");
      this.badge.firstChild.data = badge;
      this.node.classList.toggle("has-badge", badge !== "");
      this.note.firstChild.data = thumb ? "" : this.table.reason(this.row);
    }

    showRating() {
      const rating = gallery.ratings.ratingOf(this.row);
      const marked = gallery.ratings.isMarked(this.row);
      this.stars.firstChild.data = rating ? `★ ${rating}` : "";
      this.node.classList.toggle("has-stars", rating > 0);
      this.node.classList.toggle("is-marked", marked);
      this.mark.setAttribute("aria-pressed", marked);
      this.showName();
    }

    /** Name the tile for screen readers: all that it shows, then its group. */
    showName() {
      const [title, caption, badge, note] = [this.prompt, this.meta, this.badge, this.note].map((span) => span.firstChild.data);
      const rating = gallery.ratings.ratingOf(this.row);
      const parts = [title, caption, badge, rating ? `rated ${rating} of 5` : "", gallery.ratings.isMarked(this.row) ? "marked" : "", note];
      if (this.groupName !== title) parts.push(this.groupName);
      this.button.setAttribute("aria-label", parts.filter(Boolean).join(", "));
    }

    get needsImage() {
      return !this.isBlank && !this.hasRequested && Boolean(this.table.thumbs[this.row]);
    }

    loadImage() {
      this.hasRequested = true;
      this.image.src = `thumbs/${this.table.thumbs[this.row]}`;
    }

    /** Show the loaded image: on the canvas, or if the browser refuses that for files, as it is. */
    async paint() {
      const { row } = this;
      if (!this.image.isConnected) {
        const bitmap = await createImageBitmap(this.image).catch(() => null);
        if (row !== this.row || !this.hasRequested) {
          bitmap?.close();
          return;
        }
        if (bitmap) {
          this.canvas.width = bitmap.width;
          this.canvas.height = bitmap.height;
          this.surface.transferFromImageBitmap(bitmap);
        } else {
          this.canvas.replaceWith(this.image);
        }
      }
      this.node.classList.add("has-image");
    }

    /** Forget the image, so that the browser stops loading it. */
    clearImage() {
      if (this.hasRequested) {
        this.image.removeAttribute("src");
        this.surface.transferFromImageBitmap(null);
      }
      this.hasRequested = false;
      this.node.classList.remove("has-image");
    }

    fail() {
      if (!this.hasRequested) return;
      this.node.classList.add("has-no-image");
      this.note.firstChild.data = "The thumbnail is missing. Make the gallery again.";
      this.showName();
    }

    move(x, y) {
      this.node.style.transform = `translate(${x}px, ${y}px)`;
    }
  }

  /** The header of a group: its value, and how many results it has. */
  class GroupHeader {
    constructor() {
      this.title = make("span", { class: "group-title", dir: "auto" });
      this.count = make("span", { class: "group-count" });
      this.node = make("div", { class: "group-header", role: "presentation" }, icon("layers"), this.title, this.count);
    }

    show(text, count) {
      this.title.textContent = text;
      this.title.title = text.length > 80 ? text : "";
      this.count.textContent = count;
    }

    move(x, y) {
      this.node.style.transform = `translate(${x}px, ${y}px)`;
    }
  }

  gallery.tile = { Tile, GroupHeader, isFlagged, isHidden, reveal: (row) => revealed.add(row) };
})((window.BatchInferGallery ??= {}));
