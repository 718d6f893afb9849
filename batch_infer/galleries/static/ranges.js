// One section of the filters for a number or time column: a histogram to drag over, and two fields.
"use strict";

(function (gallery) {
  const { make } = gallery.dom;
  const { labels } = gallery;
  const BINS = 28;

  /** Convert epoch seconds to the local time that a datetime-local field shows, and back. */
  function toLocal(seconds) {
    const date = new Date(seconds * 1000);
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
        onchange: () => this.readFields(),
      });
    }

    readFields() {
      const read = (field, missing) => (field.value === "" ? missing : this.isTime ? fromLocal(field.value) : Number(field.value));
      this.set(read(this.min, -Infinity), read(this.max, Infinity));
    }

    set(min, max) {
      this.onChange(this.column.name, min === -Infinity && max === Infinity ? null : { min, max });
    }

    /** Return the number at a fraction of the width. Whole numbers stay whole. */
    at(fraction, rounding) {
      const { min, max, kind } = this.column;
      const number = min + Math.max(0, Math.min(1, fraction)) * (max - min);
      return kind === "number" ? Number(number.toPrecision(5)) : Math[rounding](number);
    }

    startDrag(event) {
      const box = this.plot.getBoundingClientRect();
      const fractionOf = (moved) => (moved.clientX - box.left) / box.width;
      const start = Math.floor(fractionOf(event) * BINS);
      let end = start;
      const mark = () => this.bars.forEach((bar, i) => bar.classList.toggle("is-in", i >= Math.min(start, end) && i <= Math.max(start, end)));
      const move = (moved) => {
        end = Math.max(0, Math.min(BINS - 1, Math.floor(fractionOf(moved) * BINS)));
        mark();
      };
      const stop = () => {
        this.plot.removeEventListener("pointermove", move);
        this.set(this.at(Math.min(start, end) / BINS, "floor"), this.at((Math.max(start, end) + 1) / BINS, "ceil"));
      };
      event.preventDefault();
      this.plot.setPointerCapture(event.pointerId);
      this.plot.addEventListener("pointermove", move);
      this.plot.addEventListener("pointerup", stop, { once: true });
      mark();
    }

    update(match, range) {
      const counts = match.histogram(this.column, BINS);
      const most = Math.max(1, ...counts);
      const { min, max } = this.column;
      counts.forEach((count, i) => {
        const low = min + ((max - min) * i) / BINS;
        const high = min + ((max - min) * (i + 1)) / BINS;
        this.bars[i].style.height = count ? `${Math.max(6, (100 * count) / most)}%` : "2px";
        this.bars[i].classList.toggle("is-in", !range || (high > range.min && low <= range.max));
      });
      const show = (number) => (this.isTime ? toLocal(number) : labels.number(number));
      this.min.placeholder = this.max.placeholder = "";
      if (!this.isTime) [this.min.placeholder, this.max.placeholder] = [show(min), show(max)];
      this.min.value = range && range.min > -Infinity ? show(range.min) : "";
      this.max.value = range && range.max < Infinity ? show(range.max) : "";
    }
  }

  gallery.Range = Range;
})((window.BatchInferGallery ??= {}));
