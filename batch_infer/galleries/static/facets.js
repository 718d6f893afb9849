// One section of the filters for a category or boolean column: its values, how often each occurs, and a search.
"use strict";

(function (gallery) {
  const { make } = gallery.dom;
  const { labels } = gallery;
  const SHOWN = 7;

  class Facet {
    constructor(column, onChange) {
      this.column = column;
      this.onChange = onChange;
      this.options = new Map();
      this.showsAll = false;
      this.list = make("div", { class: "facet-options", role: "group", "aria-label": labels.label(column) });
      this.search = make("input", {
        type: "search",
        class: "facet-search",
        placeholder: "Find a value",
        "aria-label": `Find a value of ${labels.label(column)}`,
        oninput: () => this.arrange(),
      });
      this.more = make("button", { type: "button", class: "link-button", onclick: () => this.toggleAll() });
      this.node = make("div", { class: "facet" }, this.search, this.list, this.more);
      for (const code of column.sortedCodes()) this.addOption(code);
      this.addOption(gallery.NO_CODE);
    }

    addOption(code) {
      const name = this.column.labelOf(code);
      const box = make("input", { type: "checkbox", onchange: () => this.change() });
      const count = make("span", { class: "facet-count" });
      const dot = this.column.name === "status" ? make("span", { class: "status-dot", "data-status": name }) : null;
      const text = make("span", { class: code === gallery.NO_CODE ? "facet-name is-nothing" : "facet-name", text: name, title: name, dir: "auto" });
      const node = make("label", { class: "facet-option" }, box, dot, text, count);
      this.options.set(code, { code, name, box, count, node, key: gallery.query.keyOf(this.column, code) });
      this.list.append(node);
    }

    change() {
      const keys = [...this.options.values()].filter(({ box }) => box.checked).map(({ key }) => key);
      this.onChange(this.column.name, new Set(keys));
    }

    toggleAll() {
      this.showsAll = !this.showsAll;
      this.arrange();
    }

    /** Show the counts of a match, and the boxes as the state has them. */
    update(match, wanted) {
      const counts = match.counts(this.column);
      for (const option of this.options.values()) {
        option.total = counts[option.code];
        option.count.textContent = labels.count(option.total);
        option.box.checked = wanted?.has(option.key) ?? false;
        option.node.classList.toggle("is-empty", option.total === 0);
      }
      this.arrange();
    }

    /** Order the values of long lists by their counts, and hide those after the first few. */
    arrange() {
      const isLong = this.column.values.length > SHOWN + 1;
      const term = this.search.value.trim().toLowerCase();
      const options = [...this.options.values()];
      if (isLong) options.sort((a, b) => b.box.checked - a.box.checked || b.total - a.total);
      let shown = 0;
      for (const { node, name, code, total, box } of options) {
        const isUnused = code === gallery.NO_CODE && total === 0 && !box.checked;
        const fits = !isUnused && (!term || name.toLowerCase().includes(term));
        node.hidden = !fits || (isLong && !this.showsAll && !term && shown >= SHOWN && !box.checked);
        if (!node.hidden) shown++;
      }
      const nodes = options.map(({ node }) => node);
      const isOrdered = nodes.every((node, i) => node === this.list.children[i]);
      if (!isOrdered && !this.list.contains(document.activeElement)) this.list.append(...nodes);
      this.search.hidden = !isLong;
      this.more.hidden = !isLong || term !== "";
      this.more.textContent = this.showsAll ? "Show fewer" : `Show all ${labels.count(this.column.values.length)}`;
    }
  }

  gallery.Facet = Facet;
})((window.BatchInferGallery ??= {}));
