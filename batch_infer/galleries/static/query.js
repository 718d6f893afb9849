// Find the results that match the filters, count the values of each filter, and group results.
"use strict";

(function (gallery) {
  const { NO_CODE } = gallery;

  /** Split a search into terms: words, "phrases", and either with a minus sign before it to exclude. */
  function parseText(text) {
    const parts = new Set(text.toLowerCase().match(/-?"[^"]+"|\S+/g));
    return [...parts]
      .map((part) => ({ excludes: part.length > 1 && part.startsWith("-"), term: part }))
      .map(({ excludes, term }) => ({ excludes, term: term.slice(excludes ? 1 : 0).replaceAll('"', "").trim() }))
      .filter(({ term }) => term);
  }

  /** Return one byte per row, 1 where a searched column contains the term. */
  function rowsWithTerm(table, term) {
    const rows = new Uint8Array(table.loaded);
    for (const column of table.columns.values()) {
      if (!column.isSearched) continue;
      const isText = column.codes instanceof Int32Array;
      const hits = isText ? column.search(term) : column.values.map((value) => Number(String(value).toLowerCase().includes(term)));
      if (!hits.includes(1)) continue;
      for (let row = 0; row < rows.length; row++) if (hits[column.codes[row]] === 1) rows[row] = 1;
    }
    return rows;
  }

  /** Return the test of a search: whether a row lacks a term, or has one that is excluded. */
  function makeTextTest(table, terms) {
    const failing = new Uint8Array(table.loaded);
    for (const { term, excludes } of terms) {
      const rows = rowsWithTerm(table, term);
      for (let row = 0; row < rows.length; row++) if (rows[row] === Number(excludes)) failing[row] = 1;
    }
    return { name: null, fails: (row) => failing[row] };
  }

  /** Return the tests of a state: objects with the name of a column, or null, and a function that says whether a row fails. */
  function makeTests(table, state) {
    const terms = parseText(state.text);
    const tests = terms.length ? [makeTextTest(table, terms)] : [];
    for (const [name, wanted] of state.facets) {
      const column = table.get(name);
      if (!(column?.codes instanceof Uint8Array)) continue;
      const passes = new Uint8Array(256);
      for (let code = 0; code < 256; code++) if (wanted.has(keyOf(column, code))) passes[code] = 1;
      const { codes } = column;
      tests.push({ name, fails: (row) => !passes[codes[row]] });
    }
    for (const [name, { min, max }] of state.ranges) {
      const { numbers } = table.get(name) ?? {};
      if (numbers) tests.push({ name, fails: (row) => !(numbers[row] >= min && numbers[row] <= max) });
    }
    return tests;
  }

  /** Return the text by which states and links name a value of a category, or null for "no value". */
  function keyOf(column, code) {
    return code === NO_CODE || code >= column.values.length ? null : String(column.values[code]);
  }

  /** The rows that match, and for each row how many tests fail and the last of them, which the counts need. */
  class Match {
    constructor(table, state) {
      this.table = table;
      this.size = table.loaded;
      this.tests = makeTests(table, state);
      this.failures = new Uint8Array(this.size);
      this.lastFailure = new Uint16Array(this.size);
      this.tests.forEach(({ fails }, index) => {
        for (let row = 0; row < this.size; row++) {
          if (!fails(row)) continue;
          if (this.failures[row] < 2) this.failures[row]++; // more than one are all the same
          this.lastFailure[row] = index;
        }
      });
    }

    /** Return the matching rows, in the given order or that of the table. */
    rows(order) {
      const rows = new Uint32Array(this.size);
      let length = 0;
      for (let i = 0; i < this.size; i++) {
        const row = order ? order[i] : i;
        if (this.failures[row] === 0) rows[length++] = row;
      }
      return rows.subarray(0, length);
    }

    /** Return a function that says whether a row matches all tests except those of one column. */
    without(name) {
      const index = this.tests.findIndex((test) => test.name === name);
      const { failures, lastFailure } = this;
      if (index < 0) return (row) => failures[row] === 0;
      return (row) => failures[row] === 0 || (failures[row] === 1 && lastFailure[row] === index);
    }

    /** Count the rows of each code of a category, as if the column had no filter. */
    counts(column) {
      const counts = new Uint32Array(256);
      const matches = this.without(column.name);
      for (let row = 0; row < this.size; row++) if (matches(row)) counts[column.codes[row]]++;
      return counts;
    }

    /** Count the rows in equal bins between `min` and `max` of a number column, as if it had no filter. */
    histogram(column, bins, { min, max } = column) {
      const counts = new Uint32Array(bins);
      const matches = this.without(column.name);
      const scale = bins / (max - min || 1);
      for (let row = 0; row < this.size; row++) {
        const number = column.numbers[row];
        if (number >= min && number <= max && matches(row)) counts[Math.min(bins - 1, Math.floor((number - min) * scale))]++;
      }
      return counts;
    }
  }

  /** Group rows by a column. Groups are in the order of their first row, and rows keep their order in a group. */
  function group(column, rows) {
    const isText = column.codes instanceof Int32Array;
    const indices = new Int32Array(isText ? column.values.length + 1 : 256).fill(-1);
    const numbers = new Uint32Array(rows.length);
    const sizes = [];
    for (let i = 0; i < rows.length; i++) {
      const key = isText ? column.codes[rows[i]] + 1 : column.codes[rows[i]];
      if (indices[key] < 0) indices[key] = sizes.push(0) - 1;
      numbers[i] = indices[key];
      sizes[indices[key]]++;
    }
    const starts = new Uint32Array(sizes.length + 1);
    sizes.forEach((size, index) => (starts[index + 1] = starts[index] + size));
    const next = starts.slice();
    const grouped = new Uint32Array(rows.length);
    for (let i = 0; i < rows.length; i++) grouped[next[numbers[i]]++] = rows[i];
    return { rows: grouped, starts };
  }

  /** Evaluate a state. Returns the rows in order, the groups' starts or null, and the Match for counts. */
  async function run(table, state) {
    const sortColumn = state.sort && table.get(state.sort.name);
    const order = sortColumn ? await gallery.sorting.order(sortColumn, table.loaded, state.sort.descending) : null;
    const match = new Match(table, state);
    const rows = match.rows(order?.length === match.size ? order : null);
    const groupColumn = state.group && table.get(state.group);
    if (!groupColumn?.codes) return { match, rows, starts: null };
    return { match, ...group(groupColumn, rows) };
  }

  gallery.query = { run, parseText, keyOf, Match };
})((window.BatchInferGallery ??= {}));
