// The player: sound, picture and words on one clock. Everything it shows comes in `data`, as text, never as HTML.
// `data`: id, language, point, audio_url, duration_s, words [{text, start_s, end_s, confidence}],
// segments [{text, start_s, end_s, confidence}], picture {peaks (base64 bytes), tiles [url], columns_per_s,
// columns_per_tile} or null, sure_from, fair_from, strings.

const players = new WeakMap();
let point = "."; // the decimal sign of the page's language

export default function (component) {
  const { data, parentElement } = component;
  point = data.point;
  const root = parentElement.querySelector(".player");
  const old = players.get(root);
  if (old && old.id === data.id && old.language === data.language) {
    old.update(data);
    return () => old.close(root);
  }
  if (old) old.close(root, true);
  const player = new Player(root, data);
  players.set(root, player);
  return () => player.close(root);
}

const clock = (s) => {
  const tenths = Math.max(0, Math.round(s * 10));
  const minutes = Math.floor(tenths / 600);
  const hours = Math.floor(minutes / 60);
  const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0").replace(".", point);
  return hours ? `${hours}:${String(minutes % 60).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
};

class Player {
  constructor(root, data) {
    this.id = data.id;
    this.language = data.language;
    this.root = root;
    this.data = data;
    this.$ = (selector) => root.querySelector(selector);
    this.audio = this.$("audio");
    this.until = null; // where to stop, when only a part is played
    this.wordAt = -1;
    this.seen = {}; // of each box, what was marked in it last
    this.listeners = new AbortController();
    this.signal = { signal: this.listeners.signal };
    this.duration = data.duration_s || 0.01;
    this.label();
    this.words();
    this.segments();
    this.$(".sound").classList.toggle("none", !data.picture);
    this.picture = data.picture ? new Picture(this) : null;
    this.controls();
    this.tick();
  }

  update(data) {
    if (data.text === this.data.text) return;
    this.data = data; // as a person corrected it: the sound is the same and plays on
    if (this.picture) this.picture.data = data;
    this.wordAt = -1;
    this.seen = {};
    this.$(".told").textContent = "";
    this.words();
    this.segments();
    this.picture?.draw();
    this.tick();
  }

  close(root, now = false) {
    // Streamlit also calls this between two runs of the page; only a player that is really gone falls silent.
    const end = () => {
      if (!now && root.isConnected) return;
      this.listeners.abort();
      this.picture?.close();
      this.audio.pause();
      if (this.blobUrl) URL.revokeObjectURL(this.blobUrl);
      if (players.get(root) === this) players.delete(root);
    };
    if (now) end();
    else setTimeout(end, 1000);
  }

  label() {
    const s = this.data.strings;
    this.root.setAttribute("aria-label", s.player);
    this.$(".play .label").textContent = s.play;
    this.$(".speed .label").textContent = s.speed;
    this.$(".copy").textContent = s.copy;
    this.$(".all").textContent = clock(this.duration);
    this.$(".hint").textContent = s.hint;
    this.$(".told").textContent = "";
    const select = this.$(".speed select");
    select.replaceChildren(
      ...[0.5, 0.75, 1, 1.25, 1.5, 2].map((rate) => new Option(`${rate}×`.replace(".", point), rate, rate === 1, rate === 1)),
    );
  }

  band(confidence) {
    if (confidence === null || confidence === undefined || confidence >= this.data.sure_from) return "sure";
    return confidence >= this.data.fair_from ? "fair" : "unsure";
  }

  words() {
    const box = this.$(".text");
    const s = this.data.strings;
    box.setAttribute("aria-label", s.words);
    box.lang = this.data.language_code || "";
    this.wordNodes = this.data.words.map((word, index) => {
      const node = document.createElement("span");
      node.className = `word ${this.band(word.confidence)}`;
      node.textContent = word.text;
      node.setAttribute("role", "button");
      node.tabIndex = index ? -1 : 0;
      const sure = word.confidence === null ? "" : `, ${Math.round(word.confidence * 100)} % ${s.sure}`;
      node.title = `${clock(word.start_s)}${sure}`;
      node.setAttribute("aria-label", `${word.text}${sure}`);
      return node;
    });
    const parts = this.wordNodes.flatMap((node) => [node, document.createTextNode(" ")]);
    box.replaceChildren(...(parts.length ? parts : [document.createTextNode(this.data.text)]));
    this.$(".hint").classList.toggle("none", !this.data.words.length);
    this.legend();
  }

  wordKey(event) {
    const index = this.wordNodes.indexOf(event.target);
    if (index < 0) return;
    const last = this.wordNodes.length - 1;
    const next = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0, End: last }[event.key];
    if (next !== undefined) this.focusWord(Math.min(last, Math.max(0, next)));
    else if (event.key === "Enter" || event.key === " ") this.playWord(index);
    else return;
    event.preventDefault();
  }

  focusWord(index) {
    for (const node of this.wordNodes) node.tabIndex = -1;
    this.wordNodes[index].tabIndex = 0;
    this.wordNodes[index].focus();
  }

  playWord(index) {
    for (const node of this.wordNodes) node.tabIndex = -1;
    this.wordNodes[index].tabIndex = 0;
    const { start_s, end_s } = this.data.words[index];
    this.playPart(start_s - 0.05, Math.max(end_s, start_s + 0.15) + 0.05);
  }

  legend() {
    const s = this.data.strings;
    const present = new Set(this.data.words.map((word) => this.band(word.confidence)));
    const samples = ["fair", "unsure"].filter((band) => present.has(band)).map((band) => {
      const node = document.createElement("span");
      node.className = `word ${band}`;
      node.textContent = s[band];
      return node;
    });
    const legend = this.$(".legend");
    legend.classList.toggle("none", !samples.length);
    legend.replaceChildren(document.createTextNode(`${s.legend} `), ...samples.flatMap((node) => [node, document.createTextNode(" ")]));
  }

  segments() {
    const s = this.data.strings;
    const list = this.data.segments;
    this.$(".segments").classList.toggle("none", !list.length);
    this.$(".segments summary").textContent = `${s.segments} (${list.length})`;
    this.$(".scroll").tabIndex = 0;
    this.$(".scroll").setAttribute("role", "region");
    this.$(".scroll").setAttribute("aria-label", s.segments);
    this.$("thead tr").replaceChildren(...[s.listen, s.from_to, s.text, s.confidence].map((text) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = text;
      return cell;
    }));
    this.rows = list.map((segment) => {
      const row = document.createElement("tr");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "▶";
      button.setAttribute("aria-label", `${s.listen}: ${segment.text}`);
      button.addEventListener("click", () => this.playPart(segment.start_s - 0.05, segment.end_s + 0.1), this.signal);
      const cells = [button, `${clock(segment.start_s)} – ${clock(segment.end_s)}`, segment.text,
        segment.confidence === null ? "" : `${Math.round(segment.confidence * 100)} %`];
      cells.forEach((content, column) => {
        const cell = document.createElement("td");
        cell.append(content);
        if (column === 1) cell.className = "time";
        row.append(cell);
      });
      return row;
    });
    this.$("tbody").replaceChildren(...this.rows);
  }

  controls() {
    const on = (target, name, handler) => target.addEventListener(name, handler, this.signal);
    on(this.$(".play"), "click", () => {
      this.until = null;
      if (!this.audio.paused) this.audio.pause();
      else this.start();
    });
    on(this.$(".speed select"), "change", (event) => { this.audio.playbackRate = Number(event.target.value); });
    on(this.$(".copy"), "click", () => this.copy());
    on(this.$(".text"), "click", (event) => {
      const index = this.wordNodes.indexOf(event.target);
      if (index >= 0 && document.getSelection().isCollapsed) this.playWord(index);
    });
    on(this.$(".text"), "keydown", (event) => this.wordKey(event));
    for (const name of ["play", "pause", "ended", "seeked", "timeupdate"]) on(this.audio, name, () => this.tick());
    on(this.audio, "error", () => { this.$(".told").textContent = this.data.strings.unplayable; });
    fetch(this.data.audio_url).then((answer) => {
      if (!answer.ok) throw new Error(String(answer.status));
      return answer.blob();
    }).then((blob) => {
      if (this.listeners.signal.aborted) return;
      this.blobUrl = URL.createObjectURL(blob); // a blob can be sought in, whatever the server's headers
      this.audio.src = this.blobUrl;
      this.root.dataset.ready = "true";
    }).catch(() => { this.$(".told").textContent = this.data.strings.unplayable; });
  }

  async copy() {
    const { text, strings } = this.data;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no permission, or the page came over plain http from another machine
      const area = document.createElement("textarea");
      area.value = text;
      this.root.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    this.$(".told").textContent = strings.copied;
  }

  start() {
    this.seen = {};
    this.audio.play().catch(() => { this.$(".told").textContent = this.data.strings.unplayable; });
  }

  playPart(from, to) {
    this.audio.currentTime = Math.max(0, from);
    this.until = Math.min(to, this.duration);
    this.root.dataset.part = `${this.audio.currentTime.toFixed(2)}-${this.until.toFixed(2)}`;
    this.start();
  }

  tick() {
    const now = this.audio.currentTime;
    if (this.until !== null && now >= this.until) {
      this.until = null;
      this.audio.pause();
    }
    const playing = !this.audio.paused;
    this.$(".play .icon").textContent = playing ? "❚❚" : "▶";
    this.$(".play .label").textContent = playing ? this.data.strings.pause : this.data.strings.play;
    this.$(".now").textContent = clock(now);
    this.mark(now, playing);
    this.picture?.moveHead(now);
    if (playing && !this.frame) {
      this.frame = requestAnimationFrame(() => { this.frame = null; this.tick(); });
    }
  }

  mark(now, playing) {
    const find = (list) => list.findIndex((item) => item.start_s <= now && now < item.end_s);
    const word = playing ? find(this.data.words) : -1;
    if (word !== this.wordAt) {
      this.wordNodes[this.wordAt]?.classList.remove("now");
      this.wordNodes[word]?.classList.add("now");
      this.wordAt = word;
      this.follow(".text", this.wordNodes[word]);
      const segment = playing ? find(this.data.segments) : -1;
      this.rows.forEach((row, index) => row.classList.toggle("now", index === segment));
      this.follow(".scroll", this.rows[segment]);
    }
  }

  follow(selector, node) {
    // Keeps what is heard in sight, unless the person has scrolled away from it to read something else.
    if (!node) return;
    const box = this.$(selector);
    const frame = box.getBoundingClientRect();
    const last = this.seen[selector]?.getBoundingClientRect();
    this.seen[selector] = node;
    if (last && (last.bottom < frame.top || last.top > frame.bottom)) return;
    const place = node.getBoundingClientRect();
    if (place.top < frame.top || place.bottom > frame.bottom) box.scrollTop += place.top - frame.top - frame.height / 4;
  }

  seek(to) {
    this.until = null;
    this.seen = {};
    this.audio.currentTime = Math.min(this.duration, Math.max(0, to));
    this.tick();
  }
}
