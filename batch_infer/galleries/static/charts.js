// Charts of the results that match the filters, and figures of the last run.
"use strict";

(function (gallery) {
  const { make } = gallery.dom;
  const { labels } = gallery;
  const BINS = 40;
  const MOST_SCORES = 12;
  const MOST_TIMES = 80; // bins of the throughput
  const LEAST_WIDTH = 10; // seconds of a bin: in a narrower one, images that finish together look like a peak
  const LEAST_SPAN = 3 * LEAST_WIDTH;
  const STAGES = { encode: "Encode prompts", denoise: "Denoise", decode: "Decode", check: "Safety check" };
  const HEIGHT = 190;

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function card(title, hint, body, isWide) {
    return make("section", { class: isWide ? "chart is-wide" : "chart" }, make("h3", { text: title }), hint ? make("p", { class: "chart-hint", text: hint }) : null, body);
  }

  /** Return the smallest and the largest number of rows: Infinity and -Infinity if they have none. */
  function span(column, rows) {
    let [min, max] = [Infinity, -Infinity];
    for (const row of rows) {
      const number = column.numbers[row];
      if (number < min) min = number;
      if (number > max) max = number;
    }
    return [min, max];
  }

  /** Count the numbers of rows in equal bins. Returns the left edges, the counts and the width of a bin, or null. */
  function bin(column, rows, bins) {
    const [min, max] = span(column, rows);
    if (min > max) return null;
    const width = (max - min) / bins || 1;
    const counts = new Array(bins).fill(0);
    for (const row of rows) {
      const number = column.numbers[row];
      if (!Number.isNaN(number)) counts[Math.min(bins - 1, Math.floor((number - min) / width))]++;
    }
    return { edges: counts.map((_, i) => min + i * width), counts, width, min, max };
  }

  function axes(isTime) {
    const style = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false }, font: "11px sans-serif" };
    return [{ ...style, grid: { show: false }, space: isTime ? 90 : 60 }, { ...style, size: 48 }];
  }

  /** Draw a chart when its box is in the page, and describe it for screen readers. */
  function plot({ x, y, isTime, width, name, description }) {
    const isBars = width !== undefined;
    const box = make("div", { class: "plot", role: "img", "aria-label": description });
    const accent = color("--accent");
    const paths = isBars ? uPlot.paths.bars({ size: [0.9, 60], align: 1 }) : uPlot.paths.linear();
    const show = (_, value) => (value === null ? "" : isTime ? labels.time(value) : labels.number(value));
    const options = {
      width: 400,
      height: HEIGHT,
      cursor: { points: { show: !isBars }, drag: { x: false, y: false } },
      legend: { show: true, live: true },
      scales: { x: { time: isTime, range: (_, min, max) => [min, max + (width ?? 0)] }, y: { range: (_, __, max) => [0, Math.max(max, 1e-9) * 1.1] } },
      axes: axes(isTime),
      series: [{ label: isTime ? "Time" : "From", value: show }, { label: name, stroke: accent, fill: `${accent}2e`, width: isBars ? 1 : 2, paths, points: { show: false }, value: (_, value) => (value === null ? "" : labels.number(value)) }],
    };
    const chart = new uPlot(options, [x, y], box);
    const observer = new ResizeObserver(([entry]) => {
      if (!box.isConnected) observer.disconnect();
      else if (entry.contentRect.width > 0) chart.setSize({ width: Math.floor(entry.contentRect.width), height: HEIGHT });
    });
    observer.observe(box);
    box.destroy = () => {
      observer.disconnect();
      chart.destroy();
    };
    return box;
  }

  function histogram(column, rows, name) {
    const bins = bin(column, rows, BINS);
    if (!bins) return null;
    const range = `${labels.number(bins.min)} to ${labels.number(bins.max)}`;
    const body = plot({ x: bins.edges, y: bins.counts, isTime: false, width: bins.width, name: "Results", description: `Histogram of ${name}: ${range}` });
    return card(name, range, body);
  }

  function throughput(table, rows) {
    const column = table.get("finished_at");
    if (!column?.numbers) return null;
    const [min, max] = span(column, rows);
    if (!(max - min >= LEAST_SPAN)) return null;
    const bins = bin(column, rows, Math.min(MOST_TIMES, Math.floor((max - min) / LEAST_WIDTH)));
    const rates = bins.counts.map((count) => (60 * count) / bins.width);
    const most = labels.plural(Math.round(Math.max(...rates)), "result");
    const body = plot({ x: bins.edges, y: rates, isTime: true, name: "Per minute", description: `Results per minute over time, at most ${most}` });
    return card("Throughput", "Results finished per minute", body, true);
  }

  /** Horizontal bars with a label and a value each. */
  function bars(entries) {
    const most = Math.max(...entries.map(({ share }) => share), 1e-9);
    const rows = entries.map(({ name, share, text, status }) => {
      const fill = make("span", { class: "hbar-fill", "data-status": status });
      fill.style.width = `${Math.max(share > 0 ? 0.5 : 0, (100 * share) / most)}%`;
      return make("li", { class: "hbar" }, make("span", { class: "hbar-name", text: name }), make("span", { class: "hbar-track" }, fill), make("span", { class: "hbar-value", text }));
    });
    return make("ul", { class: "hbars" }, ...rows);
  }

  function statuses(table, rows) {
    const column = table.get("status");
    const counts = new Uint32Array(256);
    for (const row of rows) counts[column.codes[row]]++;
    const entries = column.sortedCodes().map((code) => {
      const name = column.values[code];
      const share = rows.length ? counts[code] / rows.length : 0;
      return { name, status: name, share, text: `${labels.count(counts[code])} · ${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%` };
    });
    return card("Statuses", labels.plural(rows.length, "result"), bars(entries));
  }

  function stages({ summary }) {
    const shares = Object.entries(summary?.stage_shares ?? {});
    if (!shares.length) return null;
    const entries = shares.map(([name, share]) => ({ name: STAGES[name] ?? name, share, text: `${(100 * share).toFixed(1)}%` }));
    return card("Time per stage", "Last run; the filters do not apply", bars(entries));
  }

  /** The figures of the run that a reader looks for first. */
  function facts(run) {
    const summary = run.summary ?? {};
    const percent = (share) => (typeof share === "number" ? `${(100 * share).toFixed(1)}%` : null);
    const when = (value) => {
      const seconds = typeof value === "number" ? value : Date.parse(value) / 1000;
      return Number.isNaN(seconds) ? value : labels.time(seconds);
    };
    const entries = [
      ["Model", run.model],
      ["Scheduler", run.scheduler],
      ["Started", when(run.started_at)],
      ["Images", typeof summary.rendered === "number" ? labels.count(summary.rendered) : null],
      ["Duration", typeof summary.seconds === "number" ? labels.duration(summary.seconds) : null],
      ["Images per second", typeof summary.images_per_second === "number" ? labels.number(summary.images_per_second) : null],
      ["Occupancy", percent(summary.occupancy)],
      ["MFU", percent(summary.mfu)],
      ["Cost", typeof summary.cost === "number" ? summary.cost.toFixed(2) : null],
    ].filter(([, text]) => text !== null && text !== undefined && text !== "");
    const rows = entries.map(([name, text]) => make("div", {}, make("dt", { text: name }), make("dd", { text: String(text) })));
    return rows.length ? make("section", { class: "facts" }, make("h3", { text: "Last run" }), make("dl", {}, ...rows)) : null;
  }

  class Charts {
    constructor(table, container) {
      this.table = table;
      this.container = container;
      for (const type of ["themechange"]) window.addEventListener(type, () => this.redraw());
      window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    }

    redraw() {
      if (this.rows && !this.container.hidden) this.show(this.rows);
    }

    /** Draw the charts one by one, so that the page stays responsive. A later call ends an earlier one. */
    async show(rows) {
      this.rows = rows;
      const { table } = this;
      const number = (this.number = (this.number ?? 0) + 1);
      for (const box of this.container.querySelectorAll(".plot")) box.destroy();
      this.container.replaceChildren(...[facts(table.meta.run)].filter(Boolean));
      const scores = [...table.columns.values()].filter((column) => column.score).slice(0, MOST_SCORES);
      const cards = [
        () => throughput(table, rows),
        () => statuses(table, rows),
        () => stages(table.meta.run),
        () => (table.get("seconds")?.numbers ? histogram(table.get("seconds"), rows, "Seconds per image") : null),
        ...scores.map((column) => () => histogram(column, rows, labels.label(column))),
      ];
      for (const draw of cards) {
        const made = draw();
        if (made) this.container.append(made);
        await gallery.dom.pause();
        if (number !== this.number) return;
      }
    }
  }

  gallery.Charts = Charts;
})((window.BatchInferGallery ??= {}));
