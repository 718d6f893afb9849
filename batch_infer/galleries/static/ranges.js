// One section of the filters for a number or time column: a histogram to drag over, and two fields.
"use strict";

(function (gallery) {
  const { make } = gallery.dom;
  const { labels } = gallery;
  const BINS = 28;
  const EVERYTHING = { min: -Infinity, max: Infinity };

  /** Convert epoch seconds to the local time that a datetime-local field shows, and back. */
  function toLocal(seconds) {
    const date = new Date(seconds * 1000);
    if (Number.isNaN(date.getTime())) return "";
    return new Date(date.getTime() - date.getTimezoneOffset() * 60000).toISOString().slice(0, 19);
  }

  const fromLocal = (text) => new Date(text).getTime() / 1000;

  class Range {
    constructor(column, onChange) {
      this.column = column;
      this.onChange = onChange;
      this.isTime = column.kind === "time";
      this.bars = Array.from({ length: BINS }, () => make("span", { class: "bar" }));
      this.plot = make("div", { class: "range-plot", "aria-hidden": "true" }, ...this.bars);
      this.min = this.makeField("from");
      this.max = this.makeField("to");
      this.node = make(
        "div",
        { class: this.isTime ? "range is-time" : "range" },
        this.plot,
        make("div", { class: "range-fields" }, this.min, make("span", { text: "to", "aria-hidden": "true" }), this.max),
      );
      this.plot.addEventListener("pointerdown", (event) => this.startDrag(event));
    }

    makeField(side) {
      return make("input", {
        type: this.isTime ? "datetime-local" : "number",
        step: this.isTime ? "1" : "any",
        "aria-label": `${labels.label(this.column)}, ${side}`,
        onchange: () => this.readField(side),
      });
    }

    /** Read a changed field. The other end stays exact, whatever its field shows. */
    readField(side) {
      const { min, max } = gallery.state.ranges.get(this.column.name) ?? EVERYTHING;
      const read = ({ value }, missing) => (value === "" ? missing : this.isTime ? fromLocal(value) : Number(value));
      if (side === "from") this.set(read(this.min, -Infinity), max);
      else this.set(min, read(this.max, Infinity));
    }

    set(min, max) {
      this.onChange(this.column.name, min === -Infinity && max === Infinity ? null : { min, max });
    }

    /** Return the number at an edge of the bins, exact at both ends. `rounding` is "floor" or "ceil". */
    at(edge, rounding) {
      const { min, max } = this.column;
      if (edge <= 0) return min;
      if (edge >= BINS) return max;
      return Math.max(min, Math.min(max, this.round(min + (edge / BINS) * (max - min), rounding)));
    }

    /** Round a number to a tenth of a bin or less, and whole numbers to whole ones. */
    round(number, rounding) {
      const { min, max, kind } = this.column;
      const decimals = kind === "number" ? Math.min(100, Math.max(0, 1 - Math.floor(Math.log10((max - min) / BINS)))) : 0;
      if (Number(number.toFixed(decimals)) === number) return number;
      const scaled = number * 10 ** decimals;
      return Math.abs(scaled) <= Number.MAX_SAFE_INTEGER ? Math[rounding](scaled) / 10 ** decimals : number;
    }

    startDrag(event) {
      if (event.button !== 0 || !event.isPrimary) return;
      const box = this.plot.getBoundingClientRect();
      const fractionOf = (moved) => (moved.clientX - box.left) / box.width;
      const binOf = (moved) => Math.max(0, Math.min(BINS - 1, Math.floor(fractionOf(moved) * BINS)));
      const start = binOf(event);
      let end = start;
      const mark = () => this.bars.forEach((bar, i) => bar.classList.toggle("is-in", i >= Math.min(start, end) && i <= Math.max(start, end)));
      const move = (moved) => {
        end = binOf(moved);
        mark();
      };
      const drag = new AbortController();
      const stop = () => {
        drag.abort();
        this.set(this.at(Math.min(start, end), "floor"), this.at(Math.max(start, end) + 1, "ceil"));
      };
      const cancel = () => {
        drag.abort();
        this.markRange();
      };
      event.preventDefault();
      this.plot.setPointerCapture(event.pointerId);
      for (const [type, listener] of Object.entries({ pointermove: move, pointerup: stop, pointercancel: cancel })) {
        this.plot.addEventListener(type, listener, { signal: drag.signal });
      }
      mark();
    }

    /** Mark the bars that are in the range. */
    markRange() {
      const { min, max } = this.column;
      const range = this.range ?? EVERYTHING;
      this.bars.forEach((bar, i) => {
        const low = min + ((max - min) * i) / BINS;
        const high = min + ((max - min) * (i + 1)) / BINS;
        bar.classList.toggle("is-in", high > range.min && low <= range.max);
      });
    }

    update(match, range) {
      this.range = range;
      const counts = match.histogram(this.column, BINS);
      const most = Math.max(1, ...counts);
      counts.forEach((count, i) => (this.bars[i].style.height = count ? `${Math.max(6, (100 * count) / most)}%` : "2px"));
      this.markRange();
      const { min, max } = this.column;
      const show = (number) => (this.isTime ? toLocal(number) : String(number));
      if (!this.isTime) [this.min.placeholder, this.max.placeholder] = [show(this.round(min, "floor")), show(this.round(max, "ceil"))];
      this.min.value = range && range.min > -Infinity ? show(range.min) : "";
      this.max.value = range && range.max < Infinity ? show(range.max) : "";
    }
  }

  gallery.Range = Range;
})((window.BatchInferGallery ??= {}));
