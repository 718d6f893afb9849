// Hold the values of one column in a typed array, so that 100,000 results take little memory and filter fast.
"use strict";

(function (gallery) {
  const NO_CODE = 255;
  const STATUSES = ["ok", "flagged", "blocked", "invalid", "failed"];
  const collator = new Intl.Collator(undefined, { numeric: true });

  /** Values of a category or boolean: one byte per result, an index into `values`, or NO_CODE for null. */
  class CategoryColumn {
    constructor(description, size) {
      Object.assign(this, description);
      this.values = description.values ?? [];
      this.codes = new Uint8Array(size).fill(NO_CODE);
    }

    fill(start, cells) {
      for (let i = 0; i < cells.length; i++) if (cells[i] !== null) this.codes[start + i] = cells[i];
    }

    value(row) {
      const code = this.codes[row];
      return code === NO_CODE ? null : this.values[code];
    }

    /** Return the codes in the order in which people expect the values. */
    sortedCodes() {
      const codes = this.values.map((_, code) => code);
      if (this.name === "status") return codes.sort((a, b) => STATUSES.indexOf(this.values[a]) - STATUSES.indexOf(this.values[b]));
      return codes.sort((a, b) => this.values[a] - this.values[b] || collator.compare(this.values[a], this.values[b]));
    }

    /** Name the value of a code. */
    labelOf(code) {
      return code === NO_CODE ? gallery.labels.nothing(this) : gallery.labels.value(this, this.values[code]) || gallery.labels.EMPTY;
    }
  }

  class BooleanColumn extends CategoryColumn {
    constructor(description, size) {
      super({ ...description, values: [false, true] }, size);
    }

    fill(start, cells) {
      super.fill(start, cells.map((cell) => (cell === null ? null : Number(cell))));
    }
  }

  /** Numbers and times; NaN is null. Integers that a double cannot hold arrive as text, which `exact` keeps. */
  class NumberColumn {
    constructor(description, size) {
      Object.assign(this, description);
      this.numbers = new Float64Array(size).fill(NaN);
      this.exact = new Map();
    }

    fill(start, cells) {
      for (let i = 0; i < cells.length; i++) {
        if (cells[i] === null) continue;
        this.numbers[start + i] = Number(cells[i]);
        if (typeof cells[i] === "string") this.exact.set(start + i, cells[i]);
      }
    }

    value(row) {
      const number = this.numbers[row];
      return Number.isNaN(number) ? null : (this.exact.get(row) ?? number);
    }

    /** Widen `min` and `max`, which scores lack in the description. */
    widen(number) {
      if (!(this.min <= number)) this.min = number;
      if (!(this.max >= number)) this.max = number;
    }
  }

  /** Texts: each distinct text is stored once, and `codes` has its number for each result, or -1 for null. */
  class TextColumn {
    constructor(description, size) {
      Object.assign(this, description);
      this.codes = new Int32Array(size).fill(-1);
      this.values = [];
      this.blocks = [];
      this.codesByText = new Map();
      this.isSearched = false;
    }

    fill(start, cells) {
      const first = this.values.length;
      for (let i = 0; i < cells.length; i++) {
        if (cells[i] === null) continue;
        let code = this.codesByText.get(cells[i]);
        if (code === undefined) {
          code = this.values.push(cells[i]) - 1;
          this.codesByText.set(cells[i], code);
        }
        this.codes[start + i] = code;
      }
      if (this.isSearched && this.values.length > first) this.addBlock(first);
    }

    /** Join new texts to one lower-case string: one indexOf over it is far faster than one per text. */
    addBlock(first) {
      const texts = this.values.slice(first).map((text) => text.toLowerCase());
      const starts = new Uint32Array(texts.length + 1);
      texts.forEach((text, i) => (starts[i + 1] = starts[i] + text.length + 1));
      this.blocks.push({ first, starts, text: texts.join("\n") });
    }

    value(row) {
      const code = this.codes[row];
      return code < 0 ? null : this.values[code];
    }

    /** Return one byte per distinct text, 1 for those that contain `term`, which is in lower case. */
    search(term) {
      const hits = new Uint8Array(this.values.length);
      for (const { first, starts, text } of this.blocks) {
        let index = 0;
        for (let at = text.indexOf(term); at >= 0; at = text.indexOf(term, starts[index + 1])) {
          index = gallery.lastAtMost(starts, at, index);
          hits[first + index] = 1;
        }
      }
      return hits;
    }

    /** Release what only loading needs. */
    finish() {
      this.codesByText = null;
    }
  }

  /** Safety scores: one number column per name, which the table adds to its columns as they appear. */
  class ScoresColumn {
    constructor(description, size, addColumn) {
      Object.assign(this, description);
      this.parts = new Map();
      this.part = (name) => {
        const known = this.parts.get(name);
        if (known) return known;
        const made = new NumberColumn({ name: `${this.name}.${name}`, kind: "number", score: name }, size);
        this.parts.set(name, made);
        addColumn(made);
        return made;
      };
    }

    fill(start, cells) {
      for (let i = 0; i < cells.length; i++) {
        for (const [name, score] of Object.entries(cells[i] ?? {})) {
          if (score === null) continue;
          const part = this.part(name);
          part.numbers[start + i] = score;
          part.widen(score);
        }
      }
    }

    value(row) {
      const scores = {};
      for (const [name, part] of this.parts) if (part.value(row) !== null) scores[name] = part.value(row);
      return Object.keys(scores).length ? scores : null;
    }
  }

  const CLASSES = {
    category: CategoryColumn,
    boolean: BooleanColumn,
    integer: NumberColumn,
    number: NumberColumn,
    time: NumberColumn,
    scores: ScoresColumn,
  };

  /** Return the last index from `from` on whose entry of a sorted array is at most `value`. */
  gallery.lastAtMost = function (sorted, value, from = 0) {
    let low = from;
    let high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (sorted[middle] <= value) low = middle;
      else high = middle - 1;
    }
    return low;
  };

  gallery.NO_CODE = NO_CODE;
  gallery.columns = {
    make: (description, size, addColumn) => new (CLASSES[description.kind] ?? TextColumn)(description, size, addColumn),
  };
})((window.BatchInferGallery ??= {}));
