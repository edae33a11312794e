"use strict";
// Only in the copy that is served: asks now and then whether there is a newer page, and takes it.
(() => {
  const version = "$version", everyMs = 2000, key = "raydisp-watch";
  let timer;

  // What a reader has scrolled to and sorted by outlives the reload.
  function keep() {
    const heads = [...document.querySelectorAll("th")];
    const column = heads.findIndex((head) => head.getAttribute("aria-sort") !== "none");
    sessionStorage.setItem(key, JSON.stringify({
      at: [scrollX, scrollY],
      table: [...document.querySelectorAll(".scroll")].map((box) => [box.scrollLeft, box.scrollTop]),
      sort: column < 0 ? null : [heads[column].textContent, heads[column].getAttribute("aria-sort")],
      open: [...document.querySelectorAll("details")].map((one) => one.open),
    }));
  }
  function putBack() {
    const kept = JSON.parse(sessionStorage.getItem(key) || "null");
    sessionStorage.removeItem(key);
    if (!kept) return;
    const head = kept.sort && [...document.querySelectorAll("th")].find((th) => th.textContent === kept.sort[0]);
    for (let clicks = 0; head && clicks < 2 && head.getAttribute("aria-sort") !== kept.sort[1]; clicks++)
      head.firstChild.click();
    const details = [...document.querySelectorAll("details")];
    if (details.length === kept.open.length) details.forEach((one, index) => { one.open = kept.open[index]; });
    document.querySelectorAll(".scroll").forEach((box, index) => {
      if (kept.table[index]) box.scrollTo(...kept.table[index]);
    });
    scrollTo(...kept.at);
  }
  history.scrollRestoration = "manual";
  putBack();
  addEventListener("load", later);

  function later() {
    clearTimeout(timer);
    timer = setTimeout(ask, everyMs);
  }

  async function ask() {
    try {
      const answer = document.hidden ? null : await fetch("version", { cache: "no-store" });
      const told = answer && answer.ok ? (await answer.json()).version : version;
      if (told !== version) {
        keep();
        location.reload();
        return;
      }
    } catch (error) { /* the server has stopped, or starts again: the page stays as it is */ }
    later();
  }
  document.addEventListener("visibilitychange", () => { if (!document.hidden) later(); });
})();
