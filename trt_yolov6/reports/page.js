"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("trt-yolov6-theme"); } catch { /* a page from a file */ }

  function show() {
    const dark = chosen ? chosen === "dark" : system.matches;
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Switch to light colours" : "Switch to dark colours");
  }
  button.hidden = false;
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("trt-yolov6-theme", chosen); } catch { /* only for this visit */ }
    show();
  });
  system.addEventListener("change", show);
  show();

  // Tables whose heads are buttons sort by the cells' data-value; cells without one come last.
  for (const table of document.querySelectorAll("table.sorts")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const text = head.textContent;
      const press = document.createElement("button");
      press.type = "button";
      press.textContent = text;
      head.replaceChildren(press);
      press.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const key = (row) => row.cells[column].dataset.value;
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          const numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
          const order = numbers ? x - y : x.localeCompare(y);
          return down ? -order : order;
        });
        body.append(...rows);
      });
    });
  }

  const tip = document.getElementById("tip");
  function place(point) {
    tip.textContent = point.dataset.tip;
    tip.hidden = false;
    const mark = point.getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    const left = Math.min(Math.max(8, mark.left + mark.width / 2 - tip.offsetWidth / 2),
      wide - tip.offsetWidth - 8);
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${mark.top + window.scrollY - tip.offsetHeight - 6}px`;
  }
  for (const point of document.querySelectorAll("[data-tip]")) {
    for (const event of ["pointerenter", "focus", "click"]) {
      point.addEventListener(event, () => place(point));
    }
    for (const event of ["pointerleave", "blur"]) {
      point.addEventListener(event, () => { tip.hidden = true; });
    }
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
})();
