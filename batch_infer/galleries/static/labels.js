// Name columns and format values for people.
"use strict";

(function (gallery) {
  const LABELS = {
    __proto__: null, // a carried column may have the name of a method of objects
    id: "ID",
    image_index: "Image index",
    nsfw_content_detected: "NSFW",
    num_inference_steps: "Steps",
    guidance_scale: "Guidance scale",
    guidance_rescale: "Guidance rescale",
    prompt_truncated: "Prompt truncated",
    negative_prompt: "Negative prompt",
    safety_checker: "Safety checker",
    finished_at: "Finished",
    source_file: "Source file",
    source_row: "Source row",
    generated_image: "Image file",
    image_bytes: "Image size",
    sha256: "SHA-256",
    pixels_sha256: "SHA-256 of pixels",
    prompt_tokens: "Prompt tokens",
    seconds: "Seconds",
    rating: "Rating",
    mark: "Mark",
  };
  const SHORT = { __proto__: null, num_inference_steps: "steps", guidance_scale: "guidance", guidance_rescale: "rescale" };
  const NOTHING = { __proto__: null, nsfw_content_detected: "not checked", rating: "not rated", mark: "not marked" };
  const EMPTY = "(empty)"; // the name of an empty text among other values
  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

  /** Name a column: carried columns keep the user's spelling. */
  function label(column) {
    if (column.carried) return column.name;
    if (column.score) return `Score: ${column.score}`;
    const words = column.name.replaceAll("_", " ");
    return LABELS[column.name] ?? words.charAt(0).toUpperCase() + words.slice(1);
  }

  const shortLabel = (column) => SHORT[column.name] ?? (column.carried ? column.name : column.name.replaceAll("_", " "));

  /** Name what a null means in a column. */
  const nothing = (column) => NOTHING[column.name] ?? "no value";

  /** Format a number with at most four significant decimals, without rounding whole ones. */
  function number(value) {
    if (!Number.isFinite(value)) return String(value);
    if (Number.isInteger(value)) return String(value);
    return String(Number(value.toPrecision(Math.abs(value) >= 1000 ? 6 : 4)));
  }

  const count = (value) => whole.format(value);

  const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

  function time(seconds) {
    const options = { year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit" };
    return new Date(seconds * 1000).toLocaleString(undefined, options);
  }

  function bytes(value) {
    if (value < 1000) return `${value} bytes`;
    const power = Math.min(3, Math.floor(Math.log10(value) / 3));
    return `${(value / 1000 ** power).toFixed(1)} ${["bytes", "kB", "MB", "GB"][power]}`;
  }

  /** Format a duration in seconds, as in `1 h 20 min`. */
  function duration(seconds) {
    if (seconds < 60) return `${number(Number(seconds.toFixed(1)))} s`;
    const minutes = Math.round(seconds / 60);
    return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }

  /** Format a value of a column. Null becomes an empty string. */
  function value(column, cell) {
    if (cell === null || cell === undefined) return "";
    if (column.kind === "time") return time(cell);
    if (column.name === "image_bytes") return bytes(cell);
    if (column.local && column.name === "rating") return plural(Number(cell), "star");
    if (typeof cell === "boolean") return cell ? "yes" : "no";
    if (typeof cell === "number") return number(cell);
    if (typeof cell === "object") return JSON.stringify(cell);
    return String(cell);
  }

  gallery.labels = { EMPTY, label, shortLabel, nothing, number, count, plural, time, duration, value };
})((window.BatchInferGallery ??= {}));
