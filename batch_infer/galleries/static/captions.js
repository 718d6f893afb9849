// The second line of a tile: in a group, the values in which its results differ.
"use strict";

(function (gallery) {
  const { labels } = gallery;
  const COMPARED = ["seed", "guidance_scale", "num_inference_steps", "scheduler", "guidance_rescale", "negative_prompt"];
  const IGNORED = new Set(["prompt", "id", "status", "error", "image_index", "seconds", "finished_at", "attempt", "worker"]);
  const MOST = 3;

  /** Return the columns that are compared in groups: parameters first, then carried columns. */
  function comparedColumns(table) {
    const carried = [...table.columns.values()].filter((column) => column.carried && !IGNORED.has(column.name));
    return [...COMPARED.map((name) => table.get(name)), table.get("width"), table.get("height"), ...carried].filter(Boolean);
  }

  /** Return the columns whose values differ among the rows, at most MOST. */
  function differing(table, rows, except) {
    const sample = rows.length > 64 ? rows.subarray(0, 64) : rows;
    const differ = (column) => sample.some((row) => column.value(row) !== column.value(sample[0]));
    return comparedColumns(table).filter((column) => column.name !== except && differ(column)).slice(0, MOST);
  }

  /** Join values of a row, as in `seed 7 · guidance 5`. */
  function join(columns, row, separator = " · ") {
    const parts = [];
    for (const column of columns) {
      const cell = column.value(row);
      if (cell !== null) parts.push(`${labels.shortLabel(column)} ${labels.value(column, cell)}`);
    }
    return parts.join(separator);
  }

  /** Return the caption of a row outside a group: the value that it is sorted by, then its id. */
  function plain(table, row, sortName) {
    const id = table.value("id", row) ?? "";
    const index = table.value("image_index", row);
    const name = index ? `${id} · image ${index}` : id;
    const column = sortName && sortName !== "id" && sortName !== "prompt" ? table.get(sortName) : null;
    return column ? `${join([column], row) || labels.nothing(column)} · ${name}` : name;
  }

  gallery.captions = { differing, join, plain };
})((window.BatchInferGallery ??= {}));
