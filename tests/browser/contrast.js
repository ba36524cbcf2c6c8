// Texts whose contrast with what lies behind them is under 4.5 to 1 (WCAG 2.2, success criterion 1.4.3).
() => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const colour = (text) => {
    // the browser itself reads the colour, so that color-mix and names work too
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = text;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => under.map((c, i) => (i === 3 ? 1 : top[i] * top[3] + c * (1 - top[3])));
  const light = (rgb) => rgb.slice(0, 3)
    .map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const above = (node) => {
    const chain = [];
    for (let at = node; at; at = at.parentElement ?? at.getRootNode().host) chain.unshift(at);
    return chain;
  };
  const counts = (node) => {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    const skipped = "[disabled], [aria-disabled=true], style, script, noscript";
    return own && node.getClientRects().length && !node.closest(skipped)
      && node.checkVisibility({ opacityProperty: true, visibilityProperty: true })
      && !getComputedStyle(node).fontFamily.includes("Material");
  };
  const shadows = [...document.querySelectorAll("*")].map((node) => node.shadowRoot).filter(Boolean);
  const bad = [];
  let looked = 0;
  for (const root of [document, ...shadows]) {
    for (const node of [...root.querySelectorAll("*")].filter(counts)) {
      looked += 1;
      const chain = above(node);
      const back = chain.reduce((under, at) => over(colour(getComputedStyle(at).backgroundColor), under), [255, 255, 255, 1]);
      const ink = colour(getComputedStyle(node).color);
      ink[3] *= chain.reduce((product, at) => product * Number(getComputedStyle(at).opacity), 1);
      const [a, b] = [light(over(ink, back)), light(back)];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) bad.push(`${ratio.toFixed(2)} ${node.tagName} ${node.className} ${node.textContent.trim().slice(0, 40)}`);
    }
  }
  return { looked, bad };
}
