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
    // Below each other on a phone, the names of a long legend would take the drawing's room.
    const named = figure.data.filter((trace) => trace.name && trace.showlegend !== false).length;
    if (place.clientWidth < 480 && !place.style.height && named > 4)
      place.style.height = `calc(23rem + ${18 * (named - 4)}px)`;
    if (onPaper) Object.assign(themed.layout, { width: place.clientWidth, height: place.clientHeight });
    fit(themed.layout, place.clientWidth, place.clientHeight);
    Plotly.react(place, themed.data, themed.layout, config);
  }
}
// The title of an axis is one line, which a phone, or a low drawing, would cut off.
function wrap(title, room) {
  const most = Math.floor(room / 6.5);
  if (!title || !title.text || title.text.length <= most) return;
  const lines = [""];
  for (const word of title.text.split(" ")) {
    if (lines.at(-1) && (lines.at(-1) + " " + word).length > most) lines.push("");
    lines.push((lines.pop() + " " + word).trim());
  }
  title.text = lines.join("<br>");
}
function fit(layout, width, height) {
  wrap(layout.xaxis.title, width - 70);
  wrap(layout.yaxis.title, height - 140);
  // On a log axis plotly draws all the ticks that it was given.
  const axis = layout.xaxis, room = Math.max(2, Math.floor((width - 100) / 45));
  if (axis.type === "log" && axis.tickvals.length > room) {
    const every = Math.ceil(axis.tickvals.length / room), kept = (_, i) => i % every === 0;
    Object.assign(axis, { tickvals: axis.tickvals.filter(kept), ticktext: axis.ticktext.filter(kept) });
  }
  if (width < 480) layout.legend = { ...layout.legend, font: { size: width < 360 ? 10 : 11 } };
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
heads.forEach((head) => head.firstChild.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const key = (row) => {
    const cell = row.cells[head.cellIndex];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  };
  const body = head.closest("table").tBodies[0];
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  [...head.parentNode.cells].forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
}));
