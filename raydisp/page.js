"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const darkColours = JSON.parse(document.getElementById("dark").textContent);
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
// Only the button that saves a picture: a longer bar would lie over the legends.
const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]],
  displayModeBar: matchMedia("(hover: none)").matches ? false : "hover" };

function draw(dark, onPaper) {
  for (const [id, figure] of Object.entries(figures)) {
    const themed = JSON.parse(JSON.stringify(figure), (key, value) =>
      dark && /color$/.test(key) && darkColours[value] || value);
    // A finger that moves over a figure scrolls the page; a mouse zooms.
    if (matchMedia("(pointer: coarse)").matches) themed.layout.dragmode = false;
    // Resizing to the window comes too late for the printer: give the size outright.
    const place = document.getElementById(id);
    if (onPaper) Object.assign(themed.layout, { width: place.clientWidth, height: place.clientHeight });
    Plotly.react(place, themed.data, themed.layout, config);
  }
}
draw(prefersDark.matches, false);
prefersDark.addEventListener("change", () => draw(prefersDark.matches, false));

// Paper is white and narrower than the window: draw again for it before the pages are laid out.
function forPaper(on) {
  document.documentElement.classList.toggle("printing", on);
  draw(!on && prefersDark.matches, on);
}
addEventListener("beforeprint", () => forPaper(true));
addEventListener("afterprint", () => forPaper(false));

// Click on a header sorts by it, once more turns the order; empty cells stay last.
const heads = [...document.querySelectorAll("th")];
heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const key = (row) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  };
  const body = head.closest("table").tBodies[0];
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  heads.forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
}));
