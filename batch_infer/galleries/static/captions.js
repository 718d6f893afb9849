// The second line of a tile: in a group, the values in which its results differ.
"use strict";

(function (gallery) {
  const { labels } = gallery;
  const COMPARED = ["seed", "guidance_scale", "num_inference_steps", "scheduler", "guidance_rescale", "negative_prompt", "width", "height"];
  const MOST = 3;

  /** Return the columns that are compared in groups: parameters and carried columns, then long carried texts. */
  function comparedColumns(table) {
    const carried = [...table.columns.values()].filter((column) => column.carried);
    const isText = (column) => column.codes instanceof Int32Array;
    const parameters = COMPARED.map((name) => table.get(name)).filter(Boolean);
    return [[...parameters, ...carried.filter((column) => !isText(column))], carried.filter(isText)];
  }

  /** Return the columns whose values differ among the rows, at most MOST. Texts count only if nothing else differs. */
  function differing(table, rows, except) {
    const sample = rows.length > 64 ? rows.subarray(0, 64) : rows;
    const differ = (column) => sample.some((row) => column.value(row) !== column.value(sample[0]));
    const [values, texts] = comparedColumns(table).map((columns) => columns.filter((column) => column.name !== except && differ(column)));
    return (values.length ? values : texts).slice(0, MOST);
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
    const hasSeveral = index > 0 || (table.value("image_index", row + 1) > 0 && table.value("id", row + 1) === id);
    const name = hasSeveral ? `${id} · image ${index}` : id;
    const column = sortName && sortName !== "id" && sortName !== "prompt" ? table.get(sortName) : null;
    return column ? `${join([column], row) || labels.nothing(column)} · ${name}` : name;
  }

  gallery.captions = { differing, join, plain };
})((window.BatchInferGallery ??= {}));
