// Sort results by a column. The order of a column is computed once, in slices of a few milliseconds.
"use strict";

(function (gallery) {
  const BLOCK = 4000;
  const SLICE_MS = 12;
  const orders = new Map();

  /** Pause when the current slice of work has taken long enough. */
  class Slices {
    constructor() {
      this.started = performance.now();
    }

    isOver() {
      return performance.now() - this.started > SLICE_MS;
    }

    async pause() {
      await gallery.dom.pause();
      this.started = performance.now();
    }

    /** Call `work` with each number below `count`, and pause between slices. */
    async each(count, work) {
      for (let number = 0; number < count; number++) {
        work(number);
        if ((number & 1023) === 1023 && this.isOver()) await this.pause();
      }
    }
  }

  /** Sort texts by their code units, which the engine does without calling a comparison. */
  async function sortTexts(texts) {
    const slices = new Slices();
    let runs = [];
    for (let start = 0; start < texts.length; start += BLOCK) {
      runs.push(texts.slice(start, start + BLOCK).sort());
      if (slices.isOver()) await slices.pause();
    }
    while (runs.length > 1) {
      const merged = [];
      for (let i = 0; i < runs.length; i += 2) {
        merged.push(i + 1 < runs.length ? await merge(runs[i], runs[i + 1], slices) : runs[i]);
      }
      runs = merged;
    }
    return runs[0] ?? [];
  }

  async function merge(left, right, slices) {
    const result = [];
    for (let i = 0, k = 0; i < left.length || k < right.length; ) {
      const takesLeft = k >= right.length || (i < left.length && left[i] <= right[k]);
      result.push(takesLeft ? left[i++] : right[k++]);
      if ((result.length & 2047) === 0 && slices.isOver()) await slices.pause();
    }
    return result;
  }

  /** Return the rank of each code of a text column. Equal lower-case texts have equal ranks. */
  async function textRanks(column) {
    const slices = new Slices();
    const keys = new Array(column.values.length);
    await slices.each(keys.length, (code) => (keys[code] = column.values[code].slice(0, 200).toLowerCase()));
    const sorted = await sortTexts(keys);
    const ranks = new Map();
    await slices.each(sorted.length, (i) => ranks.has(sorted[i]) || ranks.set(sorted[i], ranks.size));
    const byCode = new Uint32Array(keys.length);
    await slices.each(keys.length, (code) => (byCode[code] = ranks.get(keys[code])));
    return byCode;
  }

  function categoryRanks(column) {
    const codes = column.sortedCodes();
    const ranks = new Uint32Array(codes.length);
    codes.forEach((code, rank) => (ranks[code] = rank));
    return ranks;
  }

  /** Return the rank of the value of each row; nulls have the highest. */
  async function rowRanks(column, size) {
    const ranks = new Uint32Array(size);
    if (column.numbers) {
      const sorted = column.numbers.slice(0, size).sort(); // NaN last
      for (let row = 0; row < size; row++) {
        const number = column.numbers[row];
        ranks[row] = Number.isNaN(number) ? size : firstAtLeast(sorted, number);
      }
      return ranks;
    }
    const isText = column.codes instanceof Int32Array;
    const byCode = isText ? await textRanks(column) : categoryRanks(column);
    for (let row = 0; row < size; row++) ranks[row] = byCode[column.codes[row]] ?? size;
    return ranks;
  }

  function firstAtLeast(sorted, number) {
    let low = 0;
    let high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < number) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** Order rows by rank, keeping rows of equal rank in their order, as a counting sort. */
  function orderByRank(ranks, descending) {
    const size = ranks.length;
    const starts = new Uint32Array(size + 2);
    const rankOf = (row) => (descending && ranks[row] < size ? size - 1 - ranks[row] : ranks[row]);
    for (let row = 0; row < size; row++) starts[rankOf(row) + 1]++;
    for (let rank = 0; rank < size; rank++) starts[rank + 1] += starts[rank];
    const order = new Uint32Array(size);
    for (let row = 0; row < size; row++) order[starts[rankOf(row)]++] = row;
    return order;
  }

  /** Return all loaded rows in the order of a column, rows without a value last. */
  async function order(column, size, descending) {
    const known = orders.get(column.name);
    const isKnown = known && known.size === size && known.version === column.version;
    const ranks = isKnown ? known.ranks : await rowRanks(column, size);
    orders.set(column.name, { ranks, size, version: column.version });
    return orderByRank(ranks, descending);
  }

  gallery.sorting = { order };
})((window.BatchInferGallery ??= {}));
