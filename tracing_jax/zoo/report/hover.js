"use strict";
(() => {
  const map = document.getElementById("heatmap"), line = document.getElementById("hover");
  const { names, rows } = JSON.parse(document.getElementById("grouped").textContent);
  const size = Number(map.dataset.cell || 0);
  const cells = rows.length > 0;
  // A grouped cell is 200 * -log10 p, plus 1 where the pair names the lower row first.
  const grouped = event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
    const left = Math.floor(point.x / size), top = Math.floor(point.y / size), value = (rows[top] || [])[left];
    if (!cells || value == null || left >= top) return null;
    const [base, ft] = value % 2 ? [names[top], names[left]] : [names[left], names[top]];
    return { base, ft, log10p: -Math.floor(value / 2) / 100 };
  };
  const pValue = log10p => log10p > -4 ? Number((10 ** log10p).toPrecision(2)) : `10^${log10p.toFixed(1)}`;
  const page = pair => "pairs/" + encodeURIComponent(`${pair.base}--${pair.ft}`) + ".html";
  map.addEventListener("pointermove", event => {
    const title = event.target.querySelector && event.target !== map && event.target.querySelector("title");
    const pair = event.target.matches("path:not(.frame)") ? grouped(event) : null;
    if (pair) line.textContent = `${pair.base} and ${pair.ft}: no evidence; p ${pValue(pair.log10p)}`;
    else if (title) line.textContent = title.textContent;
    map.style.cursor = pair ? "pointer" : "";
  });
  map.addEventListener("click", event => {
    const pair = event.target.matches("path:not(.frame)") ? grouped(event) : null;
    if (pair) location.href = page(pair);
  });
})();
