// Load the data of the gallery: script elements, since browsers refuse fetch() of file:// URLs.
"use strict";

(function (gallery) {
  const SEARCHED = new Set(["prompt", "id", "error", "negative_prompt"]);
  const DETAILS_KEPT = 12;
  const received = new Map();
  const details = new Map();

  /** Called by each data file, with the kind and number of the file. */
  gallery.receive = (kind, number, value) => received.set(`${kind}-${number}`, value);

  function loadScript(path) {
    return new Promise((resolve, reject) => {
      const script = gallery.dom.make("script", { src: path });
      script.onload = () => resolve(script.remove());
      script.onerror = () => {
        script.remove();
        reject(new Error(`${path} cannot be read. If you copied the gallery, copy the whole folder.`));
      };
      document.head.append(script);
    });
  }

  /** Load one data file and return its value. */
  async function load(kind, number = 0) {
    const name = kind === "meta" ? "meta" : `${kind}-${String(number).padStart(5, "0")}`;
    const key = `${kind}-${number}`;
    await loadScript(`data/${name}.js`);
    const value = received.get(key);
    received.delete(key);
    if (value === undefined) throw new Error(`data/${name}.js is not a data file of this gallery.`);
    return value;
  }

  /** All results: their columns by name, and how many are loaded. Rows are numbers from 0. */
  class Table {
    constructor(meta) {
      this.meta = meta;
      this.size = meta.rows;
      this.loaded = 0;
      this.columns = new Map();
      this.thumbs = new Array(meta.rows).fill(null);
      this.problems = new Map();
      this.blanked = new Set();
      for (const description of meta.columns) {
        if (!description.detail) this.add(description);
      }
    }

    add(description) {
      const column = gallery.columns.make(description, this.size, (part) => this.columns.set(part.name, part));
      const isText = column.codes instanceof Int32Array;
      column.isSearched = SEARCHED.has(column.name) || (Boolean(column.carried) && (isText || column.kind === "category"));
      this.columns.set(column.name, column);
      return column;
    }

    get(name) {
      return this.columns.get(name);
    }

    value(name, row) {
      return this.columns.get(name)?.value(row) ?? null;
    }

    /** Add the values of one data file, whose first result has the number `loaded`. */
    fill({ columns }) {
      const start = this.loaded;
      const length = columns.id.length;
      for (const [name, cells] of Object.entries(columns)) this.columns.get(name)?.fill(start, cells);
      (columns._thumb ?? []).forEach((thumb, i) => this.setThumb(start + i, thumb));
      (columns._problem ?? []).forEach((problem, i) => problem !== null && this.problems.set(start + i, problem));
      this.loaded += length;
    }

    /** Set the thumbnail of a row. A black image that was stored in place of a flagged one is not shown. */
    setThumb(row, thumb) {
      const isBlack = thumb !== null && this.meta.run.on_flagged === "blank" && this.value("status", row) === "flagged";
      if (isBlack) this.blanked.add(row);
      this.thumbs[row] = isBlack ? null : thumb;
    }

    /** Whether a black image was stored in place of a flagged one. */
    isBlanked(row) {
      return this.blanked.has(row);
    }

    /** Say why a row has no image. */
    reason(row) {
      return this.problems.get(row) ?? this.value("error", row) ?? "No image";
    }

    /** Find the row of an id and image index among the loaded ones, or return -1. */
    find(id, imageIndex) {
      const ids = this.get("id");
      const code = ids.values.indexOf(id);
      if (code < 0) return -1;
      for (let row = 0; row < this.loaded; row++) {
        if (ids.codes[row] === code && (this.value("image_index", row) ?? 0) === imageIndex) return row;
      }
      return -1;
    }
  }

  /** Load all rows, two files ahead, and call `onProgress` after each file. Each file is a separate task. */
  async function loadRows(table, onProgress) {
    const waiting = [];
    let requested = 0;
    for (let number = 0; number < table.meta.chunks; number++) {
      for (; requested < Math.min(number + 3, table.meta.chunks); requested++) {
        const part = load("rows", requested);
        part.catch(() => {}); // reported when its turn comes
        waiting.push(part);
      }
      table.fill(await waiting.shift());
      onProgress();
      await gallery.dom.pause();
    }
    for (const column of table.columns.values()) column.finish?.();
  }

  /** Return the detail columns of a row as an object. A few recent files are kept in memory. */
  async function loadDetails(table, row) {
    const number = Math.floor(row / table.meta.chunk);
    const pending = details.get(number) ?? load("details", number);
    details.delete(number);
    details.set(number, pending);
    if (details.size > DETAILS_KEPT) details.delete(details.keys().next().value);
    try {
      const { columns } = await pending;
      const offset = row - number * table.meta.chunk;
      const values = Object.create(null); // a column may have the name of a method of objects
      for (const [name, cells] of Object.entries(columns)) values[name] = cells[offset];
      return values;
    } catch (error) {
      details.delete(number);
      throw error;
    }
  }

  gallery.data = { load, loadRows, loadDetails, Table };
})((window.BatchInferGallery ??= {}));
