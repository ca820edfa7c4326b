"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Every figure gets the page's colours, whatever template it was made with; what it sets itself stays.
  const template = () => {
    const axis = { gridcolor: css("--faint"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
    const colorway = dark.matches
      ? ["#5cc6bb", "#e5a255", "#8fa8f5", "#ef8f9d", "#a8c66c", "#c79bf2", "#62b8e8", "#d8c45c"]
      : ["#0f6f6a", "#c26a12", "#4156c4", "#b83250", "#5d7f1a", "#7d3fb5", "#1677a8", "#8f7a0c"];
    return {
      layout: {
        colorway, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: css("--sans"), size: 12, color: css("--soft") },
        title: { font: { size: 14, color: css("--ink") }, x: 0.02, xanchor: "left", yref: "container", y: 0.96, yanchor: "top" },
        xaxis: axis, yaxis: axis, margin: { l: 56, r: 18, t: 22, b: 42 },
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
        hoverlabel: { bgcolor: css("--sheet"), bordercolor: css("--line"), font: { color: css("--ink") } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
      },
      data: {
        heatmap: [{ colorscale: "Viridis", colorbar: { outlinewidth: 0, thickness: 14 } }],
        contour: [{ colorscale: "Viridis", colorbar: { outlinewidth: 0, thickness: 14 } }],
      },
    };
  };

  // Plotly offers to upload a chart to its cloud; a report keeps its data to itself.
  const config = {
    responsive: true, displaylogo: false, plotlyServerURL: "", showSendToCloud: false,
    modeBarButtonsToRemove: ["sendChartToCloud", "sendDataToCloud", "editInChartStudio"],
  };

  const draw = (holder) => {
    const { data, layout } = JSON.parse(document.getElementById(holder.dataset.spec).textContent);
    // The title needs room that the margin of the template does not leave.
    const margin = layout.title && layout.title.text ? { t: 76 } : {};
    const shown = { height: 380, ...layout, template: template(), autosize: true, margin: { ...margin, ...layout.margin } };
    delete shown.width;
    window.Plotly.react(holder, data, shown, config).catch((error) => fail(holder, error));
  };
  const fail = (holder, error) => { holder.textContent = "This figure cannot be drawn: " + error; };
  const drawAll = () => {
    for (const holder of document.querySelectorAll(".plot")) {
      try { draw(holder); } catch (error) { fail(holder, error); }
    }
  };
  drawAll();
  dark.addEventListener("change", drawAll);

  // A click on a column's name sorts by it, a second click the other way round; what is no number comes last.
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
      const head = button.parentElement;
      const sortedBy = head.getAttribute("aria-sort");
      const down = head.classList.contains("number") ? sortedBy !== "descending" : sortedBy === "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.sort;
      const sorted = [...body.rows].sort((a, b) => {
        if (key(a) === undefined && key(b) === undefined) {
          return (down ? -1 : 1) * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
        }
        if (key(a) === undefined || key(b) === undefined) return key(a) === undefined ? 1 : -1;
        return (down ? -1 : 1) * (key(a) - key(b));
      });
      body.append(...sorted);
    }));
  }
})();
