"use strict";
(() => {
  const { samples, palette, clusters } = JSON.parse(document.getElementById("routes").textContent);
  const get = (id) => document.getElementById(id);
  const make = (tag, text = "", className = "") => Object.assign(document.createElement(tag), { textContent: text, className });
  const slider = get("layer"), select = get("domain"), legend = get("legend"), tip = get("tip");
  let only = null;

  const chosen = (sample, layer, token) => sample.ids[layer][token];
  const title = (expert) => `E${expert}` + (clusters[expert] ? ` (${clusters[expert].join(", ")})` : "");

  const views = samples.map((sample) => {
    const box = make("div"), head = make("h3", sample.domain), share = make("small"), text = make("div", "", "tokens");
    head.append(share);
    const spans = sample.tokens.map((piece, index) => {
      const space = /^ \S/.test(piece) ? " " : "";  // the space before a word stays plain
      const span = make("span", piece.slice(space.length).replace(/\n/g, "↵\n") || "·");
      span.dataset.index = index;
      text.append(space, span);
      return span;
    });
    box.append(head, text);
    get("samples").append(box);
    select.append(make("option", sample.domain));
    const over = (event) => {
      const index = event.target.dataset.index;
      if (index === undefined) { tip.hidden = true; return; }
      point(sample, Number(index), event);
    };
    text.addEventListener("pointermove", over);
    text.addEventListener("pointerdown", over);
    text.addEventListener("pointerleave", () => { tip.hidden = true; });
    return { sample, box, share, spans };
  });

  function point(sample, index, event) {
    const layer = Number(slider.value), path = make("div");
    sample.ids.forEach((row, at) => {
      const cell = make("i", "", at === layer ? "now" : "");
      cell.style.background = palette[row[index][0]].colour;
      path.append(cell);
    });
    const lines = chosen(sample, layer, index).map((expert) => make("div", title(expert)));
    const token = make("div", "token "), piece = make("b", JSON.stringify(sample.tokens[index]));
    token.append(piece, ` (${index + 1} of ${sample.tokens.length}), layer ${layer}:`);
    tip.replaceChildren(token, ...lines, path);
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 12)) + "px";
    tip.style.top = (event.clientY + 20 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 20) + "px";
  }

  function paint() {
    const layer = Number(slider.value);
    get("layer-now").textContent = layer;
    for (const { sample, box, share, spans } of views) {
      box.hidden = select.value !== "" && select.value !== sample.domain;
      const counts = new Map();
      spans.forEach((span, index) => {
        const experts = chosen(sample, layer, index), { colour, line } = palette[experts[0]];
        for (const expert of experts) counts.set(expert, (counts.get(expert) || 0) + 1);
        span.style.background = colour + "66";
        span.style.borderBottom = `2px ${line} ${colour}`;
        span.classList.toggle("dim", only !== null && !experts.includes(only));
      });
      const total = spans.reduce((sum, _, index) => sum + chosen(sample, layer, index).length, 0);
      const shown = sample.home !== null ? sample.home : [...counts].sort((a, b) => b[1] - a[1])[0][0];
      const label = sample.home !== null ? "its own expert" : "most to";
      share.textContent = `${label} E${shown}: ${Math.round(100 * (counts.get(shown) || 0) / total)} % in layer ${layer}`;
    }
  }

  palette.forEach(({ colour, line }, expert) => {
    const button = make("button", `E${expert}`, "chip");
    button.title = title(expert);
    button.setAttribute("aria-pressed", "false");
    button.style.setProperty("--c", colour);
    button.style.setProperty("--s", line);
    button.addEventListener("click", () => {
      only = only === expert ? null : expert;
      [...legend.children].forEach((other, index) => other.setAttribute("aria-pressed", String(index === only)));
      paint();
    });
    legend.append(button);
  });
  slider.addEventListener("input", paint);
  select.addEventListener("change", paint);
  get("controls").hidden = false;
  paint();
})();
