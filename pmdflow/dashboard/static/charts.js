// Applies what the server sends; every figure and every fragment of HTML is made there.
"use strict";
const figures = {};
const unused = ["lasso2d", "select2d", "zoomIn2d", "zoomOut2d", "autoScale2d"];
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: unused };

function draw(name) {
  const element = document.getElementById(`chart-${name}`);
  if (!element) return;
  const style = getComputedStyle(document.body);
  const figure = figures[name];
  const layout = structuredClone(figure.layout);
  layout.font = { color: style.color, family: style.fontFamily, size: 12 };
  const surface = style.getPropertyValue("--surface");
  layout.modebar = { bgcolor: surface, color: style.getPropertyValue("--dim"), activecolor: style.color };
  layout.hoverlabel = { bgcolor: surface, font: { color: style.color } };
  if (element.clientWidth < 480) { // a phone: room for the rows of the legend
    layout.legend.font.size = 9;
    layout.height += 9 * figure.data.length;
  }
  Plotly.react(element, figure.data, layout, config);
}

function apply(parts) {
  for (const [key, value] of Object.entries(parts)) {
    const [kind, name] = key.split(":");
    if (kind === "chart") {
      figures[name] = value;
      draw(name);
    } else {
      document.getElementById(name).innerHTML = value; // escaped by the server's templates
    }
  }
  document.body.dataset.updates = Number(document.body.dataset.updates) + 1;
}

const redraw = () => Object.keys(figures).forEach(draw);
document.addEventListener("themechange", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

const stream = new EventSource("/events");
stream.onmessage = (message) => apply(JSON.parse(message.data));
stream.onopen = () => delete document.body.dataset.offline;
stream.onerror = () => { document.body.dataset.offline = "1"; };
