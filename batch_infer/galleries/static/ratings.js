// Keep ratings and marks in the browser, and export them as a table.
"use strict";

(function (gallery) {
  const SEPARATOR = "\u0000";
  let key = "";
  let saved = {};
  let table = null;

  /** The rating and mark of each result, as columns of the table that filters and sorting can use. */
  function makeColumns() {
    const rating = gallery.columns.make({ name: "rating", kind: "category", values: ["1", "2", "3", "4", "5"], local: true }, table.size);
    const mark = gallery.columns.make({ name: "mark", kind: "category", values: ["marked"], local: true }, table.size);
    for (const column of [rating, mark]) {
      column.version = 0;
      table.columns.set(column.name, column);
    }
  }

  /** Read saved ratings, of other tabs too, and drop entries that are not ratings. */
  function read() {
    let value = null;
    try {
      value = JSON.parse(gallery.storage.read(key) ?? "{}");
    } catch {
      // A damaged entry is replaced on the next rating.
    }
    saved = Object.fromEntries(Object.entries(value ?? {}).filter(([, entry]) => Array.isArray(entry)));
  }

  function open(ofTable) {
    table = ofTable;
    key = `batch-infer-gallery:${table.meta.gallery_id}`;
    read();
    makeColumns();
    window.addEventListener("storage", (event) => {
      if (event.key !== key) return;
      read();
      apply(0, table.loaded);
      gallery.refresh();
    });
  }

  const nameOf = (row) => `${table.value("id", row)}${SEPARATOR}${table.value("image_index", row) ?? 0}`;

  /** Set the columns of the rows from `start` to `end` to the saved ratings. */
  function apply(start, end) {
    const rating = table.get("rating");
    const mark = table.get("mark");
    for (let row = start; row < end; row++) {
      const [stars, isMarked] = saved[nameOf(row)] ?? [0, 0];
      rating.codes[row] = stars >= 1 && stars <= 5 ? stars - 1 : gallery.NO_CODE;
      mark.codes[row] = isMarked ? 0 : gallery.NO_CODE;
    }
    rating.version++;
    mark.version++;
  }

  const ratingOf = (row) => Number(table.value("rating", row) ?? 0);

  const isMarked = (row) => table.value("mark", row) !== null;

  function store(row, rating, mark) {
    read(); // another tab may have saved since
    if (rating || mark) saved[nameOf(row)] = [rating, mark ? 1 : 0];
    else delete saved[nameOf(row)];
    apply(row, row + 1);
    if (!gallery.storage.write(key, JSON.stringify(saved))) {
      gallery.dom.toast("This browser does not keep ratings. Export them before you close the page.");
    }
    window.dispatchEvent(new CustomEvent("rating", { detail: row }));
  }

  /** Rate a row from 1 to 5; 0, or the rating it has, removes the rating. */
  function rate(row, rating) {
    store(row, rating === ratingOf(row) ? 0 : rating, isMarked(row));
  }

  function toggleMark(row) {
    store(row, ratingOf(row), !isMarked(row));
  }

  /** Return the loaded rows that are rated or marked. */
  function ratedRows() {
    const rows = [];
    const rating = table.get("rating").codes;
    const mark = table.get("mark").codes;
    for (let row = 0; row < table.loaded; row++) {
      if (rating[row] !== gallery.NO_CODE || mark[row] !== gallery.NO_CODE) rows.push(row);
    }
    return rows;
  }

  /** Quote a CSV cell as RFC 4180 says. */
  function cell(value) {
    const text = value === null ? "" : String(value);
    return /[",\r\n]/.test(text) || text !== text.trim() ? `"${text.replaceAll('"', '""')}"` : text;
  }

  /** Put an apostrophe before text that spreadsheets would run as a formula. A number is none. */
  const disarm = (text) => (/^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text);

  const PARAMETERS = ["seed", "height", "width", "num_inference_steps", "guidance_scale", "guidance_rescale"];
  const TEXTS = ["prompt", "negative_prompt"];
  const COLUMNS = ["id", "image_index", "rating", "mark", "status", ...PARAMETERS, ...TEXTS];

  /** A value of a carried column as a table has it. */
  function carriedCell(column, value) {
    if (value === null) return "";
    if (column.kind === "time") return new Date(value * 1000).toISOString();
    return typeof value === "string" ? disarm(value) : value;
  }

  /**
   * Return rows as CSV, which `batch-infer retry --ids` accepts, and `batch-infer run` as a table. Excel recognises UTF-8
   * by the byte order mark. `details` has the whole texts of a single row.
   */
  function toCsv(rows, details = null) {
    const carried = table.meta.columns.filter((column) => column.carried && (details ? column.kind !== "json" : !column.detail));
    const valueOf = (name, row) => details?.[name] ?? table.value(name, row);
    const lines = [`\ufeff${[...COLUMNS, ...carried.map(({ name }) => disarm(name))].map(cell).join(",")}`];
    for (const row of rows) {
      const values = [table.value("id", row), table.value("image_index", row) ?? 0, ratingOf(row) || null, isMarked(row) ? 1 : 0];
      values.push(table.value("status", row), ...PARAMETERS.map((name) => table.value(name, row)));
      values.push(...TEXTS.map((name) => disarm(valueOf(name, row) ?? "")));
      values.push(...carried.map((column) => carriedCell(column, valueOf(column.name, row))));
      lines.push(values.map(cell).join(","));
    }
    return `${lines.join("\r\n")}\r\n`;
  }

  gallery.ratings = { open, apply, rate, toggleMark, ratingOf, isMarked, ratedRows, disarm, toCsv };
})((window.BatchInferGallery ??= {}));
