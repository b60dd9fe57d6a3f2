"use strict";
// Draws the curves in the colours of the page, and puts a slider over the pictures.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const frames = Object.keys(figures).map((key) => [key, document.getElementById("plot-" + key)]);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

  const theme = () => ({
    "modebar.bgcolor": "rgba(0,0,0,0)",
    "modebar.color": color("line"),
    "modebar.activecolor": color("link"),
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    "font.color": color("ink"),
    "font.family": getComputedStyle(document.body).fontFamily,
    "font.size": 12,
    "hoverlabel.bgcolor": color("card"),
    "hoverlabel.bordercolor": color("line"),
    "hoverlabel.font.color": color("ink"),
    "xaxis.gridcolor": color("grid"),
    "yaxis.gridcolor": color("grid"),
    "xaxis.linecolor": color("line"),
    "yaxis.linecolor": color("line"),
  });

  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  for (const [key, frame] of frames) {
    Plotly.newPlot(frame, figures[key].data, figures[key].layout, config);
    Plotly.relayout(frame, theme());
  }
  const recolor = () => frames.forEach(([, frame]) => { Plotly.relayout(frame, theme()); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);

  // On paper: light colours whatever the screen has, and two curves beside each other on a page.
  const paper = (on) => {
    document.documentElement.classList.toggle("paper", on);
    const size = on ? { autosize: false, width: 330, height: 250 } : { autosize: true, width: null, height: 300 };
    for (const [, frame] of frames) Plotly.relayout(frame, { ...theme(), ...size, "font.size": on ? 10 : 12 });
  };
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));

  for (const button of document.querySelectorAll("button.log")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      Plotly.relayout("plot-" + button.dataset.plot, { "yaxis.type": on ? "log" : "linear", "yaxis.autorange": true });
    });
  }

  // One slider for all runs: each shows its latest picture up to that step, or its first one.
  for (const viewer of document.querySelectorAll(".viewer")) {
    const step = (sheet) => (sheet.dataset.step === "end" ? Infinity : Number(sheet.dataset.step));
    const columns = [...viewer.querySelectorAll(".sheets")].map((column) => [...column.querySelectorAll(".sheet")]);
    const steps = [...new Set(columns.flat().map(step))].sort((a, b) => a - b);
    if (steps.length < 2) continue;
    const bar = document.createElement("div");
    bar.className = "slider";
    const range = document.createElement("input");
    Object.assign(range, { type: "range", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1 });
    range.setAttribute("aria-label", "step");
    const told = document.createElement("output");
    bar.append(range, told);
    viewer.prepend(bar);
    const show = () => {
      const now = steps[Number(range.value)];
      told.textContent = now === Infinity ? "end of training" : "step " + now.toLocaleString("en");
      for (const sheets of columns) {
        const past = sheets.filter((sheet) => step(sheet) <= now);
        const chosen = past.length ? past[past.length - 1] : sheets[0];
        for (const sheet of sheets) sheet.style.display = sheet === chosen ? "" : "none";
      }
    };
    range.addEventListener("input", show);
    show();
  }
})();
