// Compute where tiles and group headers are, for any number of results.
"use strict";

(function (gallery) {
  const GAP = 12;
  const TEXT_HEIGHT = 46;
  const HEADER_HEIGHT = 52;
  const GROUP_SPACE = 20;
  const SIZES = { small: 116, medium: 176, large: 264 };

  /** Positions of the tiles of a view. `starts` are the first positions of its groups, or null. Lengths are in px. */
  class Layout {
    constructor({ count, starts, width, size, ratio }) {
      const minimum = Math.min(SIZES[size], (width - GAP) / 2);
      this.count = count;
      this.starts = starts;
      this.columns = Math.max(1, Math.floor((width + GAP) / (minimum + GAP)));
      this.width = (width - GAP * (this.columns - 1)) / this.columns;
      this.imageHeight = Math.round(this.width / ratio);
      this.height = this.imageHeight + (size === "small" ? 0 : TEXT_HEIGHT);
      this.pitch = this.height + GAP;
      this.tops = starts && this.groupTops();
      this.total = this.tops ? this.tops[this.tops.length - 1] : Math.ceil(count / this.columns) * this.pitch;
    }

    groupTops() {
      const tops = new Float64Array(this.starts.length);
      for (let index = 0; index + 1 < tops.length; index++) {
        const rows = Math.ceil((this.starts[index + 1] - this.starts[index]) / this.columns);
        tops[index + 1] = tops[index] + HEADER_HEIGHT + rows * this.pitch + GROUP_SPACE;
      }
      return tops;
    }

    groupOf(position) {
      return gallery.lastAtMost(this.starts.subarray(0, this.starts.length - 1), position);
    }

    /** Return where a tile is. */
    locate(position) {
      const index = this.tops ? this.groupOf(position) : 0;
      const offset = position - (this.tops ? this.starts[index] : 0);
      const top = this.tops ? this.tops[index] + HEADER_HEIGHT : 0;
      return {
        x: (offset % this.columns) * (this.width + GAP),
        y: top + Math.floor(offset / this.columns) * this.pitch,
      };
    }

    /** Return the positions and groups that are between two heights. */
    visible(from, to) {
      if (!this.tops) {
        const first = Math.max(0, Math.floor(from / this.pitch)) * this.columns;
        const last = Math.min(this.count, (Math.floor(to / this.pitch) + 1) * this.columns);
        return { positions: range(first, last), groups: [] };
      }
      const groups = [];
      const positions = [];
      const last = this.tops.length - 1;
      for (let index = gallery.lastAtMost(this.tops, from); index < last && this.tops[index] <= to; index++) {
        groups.push(index);
        const top = this.tops[index] + HEADER_HEIGHT;
        const firstRow = Math.max(0, Math.floor((from - top) / this.pitch));
        const lastRow = Math.max(0, Math.floor((to - top) / this.pitch) + 1);
        const start = this.starts[index];
        const end = this.starts[index + 1];
        positions.push(...range(start + firstRow * this.columns, Math.min(end, start + lastRow * this.columns)));
      }
      return { positions, groups };
    }

    /** Return the position one row above (-1) or below (1) another, or the same one at the ends. */
    neighbour(position, direction) {
      const { x, y } = this.locate(position);
      const step = direction * this.columns;
      if (!this.tops) return position + step >= 0 && position + step < this.count ? position + step : position;
      const near = Math.max(0, Math.min(this.count - 1, position + step));
      for (let other = near; other >= 0 && other < this.count && other !== position; other -= direction) {
        const candidate = this.locate(other);
        if (candidate.y !== y && candidate.x <= x) return other;
      }
      return Math.max(0, Math.min(this.count - 1, position + direction));
    }
  }

  function range(first, end) {
    const numbers = [];
    for (let number = first; number < end; number++) numbers.push(number);
    return numbers;
  }

  gallery.layout = { Layout, SIZES };
})((window.BatchInferGallery ??= {}));
