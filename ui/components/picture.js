// Waveform, word marks and mel spectrogram, drawn for the part of the sound around the playing position.
// A short sound is shown whole; a longer one gets an overview on top and a window that follows the position.

const PIXELS_PER_SECOND = 44;

class Picture {
  constructor(player) {
    this.player = player;
    this.data = player.data;
    this.$ = player.$;
    this.root = player.root;
    this.duration = player.duration;
    this.from = 0;
    const { picture } = this.data;
    this.peaks = Uint8Array.from(atob(picture.peaks), (letter) => letter.charCodeAt(0));
    this.tiles = picture.tiles.map((url) => {
      const image = new Image();
      image.onload = () => this.draw();
      image.src = url;
      return image;
    });
    const views = this.$(".views");
    const s = this.data.strings;
    views.setAttribute("aria-label", s.position);
    views.setAttribute("aria-valuemax", this.duration.toFixed(1));
    this.$(".what").textContent = s.picture;
    const seek = (event) => {
      const box = views.getBoundingClientRect();
      player.seek(this.from + ((event.clientX - box.left) / box.width) * this.span);
    };
    views.addEventListener("pointerdown", (event) => { if (event.isPrimary) seek(event); }, player.signal);
    views.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 0.5, ArrowLeft: -0.5, PageDown: 10, PageUp: -10 }[event.key];
      if (step !== undefined) player.seek(player.audio.currentTime + step);
      else if (event.key === "Home") player.seek(0);
      else if (event.key === "End") player.seek(this.duration);
      else if (event.key === " " || event.key === "Enter") this.$(".play").click();
      else return;
      event.preventDefault();
    }, player.signal);
    this.$(".overview").addEventListener("pointerdown", (event) => {
      const box = event.target.getBoundingClientRect();
      player.seek(((event.clientX - box.left) / box.width) * this.duration);
    }, player.signal);
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(views);
  }

  close() {
    this.watch.disconnect();
  }

  moveHead(now) {
    if (!this.span) return;
    if (now < this.from || now > this.from + this.span) {
      this.from = Math.min(Math.max(0, now - this.span * 0.1), Math.max(0, this.duration - this.span));
      this.draw();
    }
    const views = this.$(".views");
    this.$(".head").style.transform = `translateX(${((now - this.from) / this.span) * views.clientWidth - 1}px)`;
    views.setAttribute("aria-valuenow", now.toFixed(1));
    views.setAttribute("aria-valuetext", clock(now));
  }

  canvas(selector) {
    const node = this.$(selector);
    const scale = window.devicePixelRatio || 1;
    const height = (node.dataset.height ??= node.getAttribute("height"));
    const width = node.clientWidth;
    node.style.height = `${height}px`;
    node.width = Math.round(width * scale);
    node.height = Math.round(height * scale);
    const pen = node.getContext("2d");
    pen.scale(scale, scale);
    return { pen, width, height: Number(height) };
  }

  draw() {
    const views = this.$(".views");
    if (!views.clientWidth) return;
    this.span = Math.min(this.duration, Math.max(6, views.clientWidth / PIXELS_PER_SECOND));
    this.from = Math.min(this.from, Math.max(0, this.duration - this.span));
    const style = getComputedStyle(this.root);
    const ink = style.color;
    const accent = style.getPropertyValue("--st-primary-color") || ink;
    this.drawWave(".wave", this.from, this.span, accent);
    this.drawMarks(ink);
    this.drawMel(ink);
    const whole = this.span >= this.duration;
    this.$(".overview").classList.toggle("none", whole);
    if (!whole) {
      const { pen, width, height } = this.drawWave(".overview", 0, this.duration, accent);
      pen.strokeStyle = ink;
      pen.lineWidth = 2;
      pen.strokeRect((this.from / this.duration) * width + 1, 1, Math.max(4, (this.span / this.duration) * width - 2), height - 2);
    }
    this.$(".from").textContent = clock(this.from);
    this.$(".to").textContent = clock(this.from + this.span);
    this.moveHead(this.player.audio.currentTime);
  }

  drawWave(selector, from, span, color) {
    const made = this.canvas(selector);
    const { pen, width, height } = made;
    const rate = this.data.picture.columns_per_s;
    pen.fillStyle = color;
    for (let x = 0; x < width; x += 1) {
      const first = Math.floor((from + (x / width) * span) * rate);
      const after = Math.max(first + 1, Math.floor((from + ((x + 1) / width) * span) * rate));
      let peak = 0;
      for (let i = first; i < after && i < this.peaks.length; i += 1) peak = Math.max(peak, this.peaks[i]);
      const tall = Math.max(1, (peak / 255) * (height - 4));
      pen.fillRect(x, (height - tall) / 2, 1, tall);
    }
    return made;
  }

  visibleWords() {
    return this.data.words.filter((word) => word.end_s >= this.from && word.start_s <= this.from + this.span);
  }

  drawMarks(ink) {
    const { pen, width, height } = this.canvas(".marks");
    const x = (time) => ((time - this.from) / this.span) * width;
    pen.font = `13px ${getComputedStyle(this.root).fontFamily}`;
    pen.textBaseline = "middle";
    pen.fillStyle = ink;
    const words = this.visibleWords();
    words.forEach((word, index) => {
      const left = x(word.start_s);
      const next = index + 1 < words.length ? x(words[index + 1].start_s) : width;
      const room = Math.max(2, next - left - 3);
      pen.fillRect(left, 0, Math.max(2, x(word.end_s) - left), 2);
      pen.fillRect(left, 0, 1, height);
      pen.save();
      pen.beginPath();
      pen.rect(left, 0, room, height);
      pen.clip();
      pen.fillText(word.text, left + 3, height / 2 + 2);
      pen.restore();
    });
  }

  drawMel(ink) {
    const { pen, width, height } = this.canvas(".mel");
    const { columns_per_s: rate, columns_per_tile: size } = this.data.picture;
    this.tiles.forEach((tile, index) => {
      if (!tile.complete || !tile.naturalWidth) return;
      const start = (index * size) / rate;
      const left = ((start - this.from) / this.span) * width;
      const wide = (tile.naturalWidth / rate / this.span) * width;
      if (left < width && left + wide > 0) pen.drawImage(tile, left, 0, wide, height);
    });
    pen.fillStyle = "rgba(255, 255, 255, .55)";
    for (const word of this.visibleWords()) pen.fillRect(((word.start_s - this.from) / this.span) * width, 0, 1, height);
  }
}
