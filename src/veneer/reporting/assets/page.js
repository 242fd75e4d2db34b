"use strict";
// Draws what #chart-data holds into the elements chart-NAME. Colours are Okabe and Ito's, told apart by colour-blind
// readers; dashes and markers tell the series apart without colour.
(() => {
  const COLOURS = {
    light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"],
    dark: ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442"],
  };
  const DASHES = ["solid", [7, 4], [2, 3], [9, 3, 2, 3]];
  const SYMBOLS = ["circle", "rect", "triangle", "diamond", "emptyCircle", "emptyRect"];
  const MOST_MARKED = 40; // points; of more, markers hide the line
  const MOST_NAMED = 6; // series in the legend at a time
  const PAPER = { width: 440, height: 270 };
  const HEIGHT_OF_ENTRY = 20; // of the legend, in pixels

  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const darkMode = window.matchMedia("(prefers-color-scheme: dark)");
  const drawn = [];
  let printing = false;

  const number = (value) => {
    if (typeof value !== "number") return String(value ?? "");
    return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(5)));
  };

  const escaped = (text) => {
    const holder = document.createElement("span");
    holder.textContent = text;
    return holder.innerHTML;
  };

  function series(chart, place, colours) {
    const { name, points, faint, mean } = chart.series[place];
    const scatter = chart.kind === "scatter" || mean !== "";
    const like = mean ? chart.series.findIndex((one) => one.name === mean) : place;
    const colour = colours[like % colours.length];
    return {
      name,
      type: scatter ? "scatter" : chart.kind === "bar" ? "bar" : "line",
      data: points,
      symbol: SYMBOLS[like % SYMBOLS.length],
      symbolSize: mean ? 6 : scatter ? 11 : 7,
      showSymbol: points.length <= MOST_MARKED && !faint,
      itemStyle: { color: colour, opacity: faint || mean ? 0.45 : 1 },
      lineStyle: { color: colour, width: faint ? 1 : 2, opacity: faint ? 0.45 : 1, type: DASHES[place % DASHES.length] },
    };
  }

  function option(chart) {
    const dark = darkMode.matches && !printing;
    const text = dark ? "#c9d0d9" : "#333333";
    const line = dark ? "#3a424e" : "#d5d9e0";
    const categories = chart.categories.length > 0;
    const named = chart.series.filter((one) => one.mean === "").map((one) => one.name);
    const several = named.length > 1;
    const axis = {
      axisLabel: { color: text, hideOverlap: true },
      axisLine: { lineStyle: { color: text } },
      splitLine: { lineStyle: { color: line } },
      nameTextStyle: { color: text },
    };
    const top = 48 + (several ? HEIGHT_OF_ENTRY * (named.length > MOST_NAMED ? 1 : Math.ceil(named.length / 2)) : 0);
    return {
      animation: false,
      backgroundColor: "transparent",
      textStyle: { fontFamily: "inherit" },
      grid: { left: 8, right: 20, top, bottom: printing ? 24 : 64, containLabel: true },
      legend: {
        show: several, data: named, top: 0, left: 0, width: "78%", itemGap: 12, itemWidth: 34, textStyle: { color: text },
        type: named.length > MOST_NAMED ? "scroll" : "plain",
      },
      tooltip: {
        trigger: chart.kind === "scatter" ? "item" : "axis",
        confine: true,
        backgroundColor: dark ? "#1e232b" : "#ffffff",
        borderColor: line,
        textStyle: { color: dark ? "#e8e8e8" : "#1a1a1a" },
        formatter: (found) => {
          const items = Array.isArray(found) ? found : [found];
          const lines = items.map((item) => `${item.marker} ${escaped(item.seriesName)}: <b>${number(item.value[1])}</b>`);
          return [`${escaped(chart.x)} ${escaped(number(items[0].value[0]))}`, ...lines].join("<br>");
        },
      },
      toolbox: {
        show: !printing, right: 4, top: 0,
        iconStyle: { borderColor: text },
        feature: { dataZoom: { title: { zoom: "zoom into a part", back: "back" } }, restore: { title: "the whole" } },
      },
      dataZoom: printing ? [] : [
        { type: "slider", height: 22, bottom: 6, handleSize: "140%", moveHandleSize: 8, filterMode: "filter", borderColor: line, textStyle: { color: text },
          labelFormatter: (value, label) => (categories ? label : number(Math.round(value))) },
        { type: "inside", filterMode: "filter", zoomOnMouseWheel: "ctrl", moveOnMouseMove: false, moveOnMouseWheel: false },
      ],
      xAxis: { ...axis, type: categories ? "category" : "value", name: chart.x, nameLocation: "middle", nameGap: 26,
               min: categories ? undefined : "dataMin", max: categories ? undefined : "dataMax",
               splitLine: { show: false }, data: categories ? chart.categories : undefined },
      yAxis: { ...axis, type: chart.log ? "log" : "value", scale: true, name: chart.log ? `${chart.y} (logarithmic)` : chart.y, nameLocation: "end", nameGap: 8,
               nameTextStyle: { color: text, align: "left" },
               axisLabel: { ...axis.axisLabel, formatter: number } },
      series: chart.series.map((_, place) => series(chart, place, dark ? COLOURS.dark : COLOURS.light)),
    };
  }

  // The paper's width is not known before it is printed, so that a chart gets a size of its own there, and scales.
  function redraw() {
    for (const { instance, chart } of drawn) {
      instance.setOption(option(chart), { notMerge: true });
      instance.resize(printing ? PAPER : { width: "auto", height: "auto" });
      instance.getZr().flush();
      const drawing = instance.getDom().querySelector("svg");
      if (printing) drawing.setAttribute("viewBox", `0 0 ${PAPER.width} ${PAPER.height}`);
      else drawing.removeAttribute("viewBox");
    }
  }

  for (const chart of data) {
    const element = document.getElementById(`chart-${chart.name}`);
    const instance = echarts.init(element, null, { renderer: "svg" });
    drawn.push({ instance, chart });
    instance.setOption(option(chart));
    new ResizeObserver(() => { if (!printing) instance.resize(); }).observe(element);
  }
  darkMode.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { printing = true; redraw(); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });
})();
