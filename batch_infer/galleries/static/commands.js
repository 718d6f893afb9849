// Make commands for a POSIX shell.
"use strict";

(function (gallery) {
  /** Quote an argument for a POSIX shell, as Python's shlex.quote does. */
  function quote(text) {
    return text !== "" && /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;
  }

  /** Join a command and its positional arguments, with -- before them if one could be read as an option. */
  function join(words, positional) {
    const separator = positional.some((text) => text.startsWith("-")) ? ["--"] : [];
    return [...words, ...separator, ...positional.map(quote)].join(" ");
  }

  /** The command that renders a row again. */
  function retry(out, id) {
    return join(["batch-infer", "retry", id.startsWith("-") ? `--id=${quote(id)}` : `--id ${quote(id)}`], [out]);
  }

  /** The command that prints a script for plain diffusers. */
  function exportRecipe(out, id, imageIndex) {
    return join(["batch-infer", "export-recipe", ...(imageIndex ? ["--image-index", imageIndex] : [])], [out, id]);
  }

  /** The command that renders the rows of an exported table again. */
  const retryTable = (out, file) => join(["batch-infer", "retry", "--ids", quote(file)], [out]);

  /** The command that renders an exported table into another folder. One row of it may have had several images. */
  function runTable(modelOptions, file) {
    return join(["batch-infer", "run", ...modelOptions.map(quote), "--column", "id=", "--out", "other"], [file]);
  }

  /** The command that makes this gallery again. */
  const makeGallery = (out) => join(["batch-infer", "gallery"], [out]);

  gallery.commands = { quote, retry, exportRecipe, retryTable, runTable, makeGallery };
})((window.BatchInferGallery ??= {}));
