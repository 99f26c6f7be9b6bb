"use strict";
// What the server says is put into the document as text, never as HTML: names in the configuration are not trusted.
(() => {
  const SPAN_S = 600;              // what the plots show
  const PLOT_POINTS = 120;
  const UPSTREAMS_MAX = 200;       // rows of a pool; the ones in trouble come first
  const STALE_MS = 5000;
  const TAP_EVERY_MS = 3000;
  const TAP_ROWS = 25;
  const REGULAR = new Set(["client.relay.closed", "upstream.relay.closed", "client.relay.reset"]);
  const REGULAR_SESSION = new Set(["preface.relay.idle_timeout", "preface.relay.responses"]);

  const byId = (id) => document.getElementById(id);
  const list = (value) => (Array.isArray(value) ? value : []);
  const entries = (value) => (value && typeof value === "object" && !Array.isArray(value) ? Object.entries(value) : []);
  const number = (value) => (typeof value === "number" && isFinite(value) ? value : null);
  const words = (value) => (value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));

  // ---- The document

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  /// Leaves what has not changed alone, so that a selection in it stays.
  function say(node, text) {
    if (node.textContent !== text) node.textContent = text;
  }

  /// Text in which commands stand between backticks.
  function tell(node, text) {
    if (node.told_ === text) return;
    node.told_ = text;
    node.replaceChildren(...text.split("`").map((part, at) => (at % 2 ? make("code", "", part) : part)));
  }

  function dress(node, className) {
    if (node.className !== className) node.className = className;
  }

  /// One child for each item, in their order; those that stay are the same nodes as before.
  function keep(parent, items, keyOf, create, update) {
    const known = parent.known || (parent.known = new Map());
    const seen = new Set();
    let at = parent.firstElementChild;
    for (const item of items) {
      const key = keyOf(item);
      if (seen.has(key)) continue;
      seen.add(key);
      let node = known.get(key);
      if (!node) known.set(key, (node = create(item)));
      if (node === at) at = at.nextElementSibling;
      else parent.insertBefore(node, at);
      update(node, item);
    }
    for (const [key, node] of known) if (!seen.has(key)) { node.remove(); known.delete(key); }
  }

  function table(columns) {
    const node = make("table");
    const row = make("tr");
    for (const column of columns) row.append(make("th", column.number ? "number" : "", column.name));
    const head = make("thead");
    head.append(row);
    node.rows_ = make("tbody");
    node.append(head, node.rows_);
    return node;
  }

  function row(columns) {
    const node = make("tr");
    node.cells_ = {};
    for (const column of columns) {
      const cell = make("td", [column.number ? "number" : "", column.className || ""].join(" ").trim());
      if (column.name) cell.dataset.label = column.name;
      node.cells_[column.key] = cell;
      node.append(cell);
    }
    return node;
  }

  function card(parent, title) {
    const node = make("div", "card");
    const head = make("div", "head");
    node.title_ = make("h2", "", title);
    node.about_ = make("span", "quiet");
    head.append(node.title_, node.about_);
    node.append(head);
    if (parent) parent.append(node);
    return node;
  }

  const SVG = "http://www.w3.org/2000/svg";
  function plot(className) {
    const node = document.createElementNS(SVG, "svg");
    node.setAttribute("class", className ? "plot " + className : "plot");
    node.setAttribute("viewBox", "0 0 100 30");
    node.setAttribute("preserveAspectRatio", "none");
    node.setAttribute("role", "img");
    node.area_ = document.createElementNS(SVG, "polygon");
    node.line_ = document.createElementNS(SVG, "polyline");
    node.name_ = document.createElementNS(SVG, "title");
    node.append(node.name_, node.area_, node.line_);
    return node;
  }

  /// The highest value of each of PLOT_POINTS slices of time: a short peak must not vanish.
  function draw(node, points, now, unit, { what, atLeast } = {}) {
    const slices = new Array(PLOT_POINTS).fill(null);
    let top = 0;
    for (const [time, value] of points) {
      const slice = Math.floor(PLOT_POINTS - 1 - (now - time) / SPAN_S * PLOT_POINTS);
      if (slice < 0 || slice >= PLOT_POINTS) continue;
      slices[slice] = Math.max(slices[slice] ?? 0, value);
      top = Math.max(top, value);
    }
    const line = [];
    const height = Math.max(top, atLeast || 0) || 1;
    slices.forEach((value, slice) => {
      if (value !== null) line.push((slice / (PLOT_POINTS - 1) * 100).toFixed(1) + "," + (29 - value / height * 27).toFixed(1));
    });
    if (line.length === 1) line.unshift(line[0].replace(/^[^,]*/, "0"));
    node.line_.setAttribute("points", line.join(" "));
    const ends = line.length ? [line[0].split(",")[0] + ",30", line[line.length - 1].split(",")[0] + ",30"] : [];
    node.area_.setAttribute("points", ends.length ? [ends[0], ...line, ends[1]].join(" ") : "");
    node.name_.textContent = (what ? what + ", " : "") + "last ten minutes, at most " + unit(top);
  }

  // ---- Numbers

  function count(value) {
    if (value === null || value === undefined) return "–";
    if (value >= 1e6) return (value / 1e6).toPrecision(3) + "M";
    if (value >= 1e5) return (value / 1e3).toFixed(0) + "k";
    if (value >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en").replace(/,/g, "\u202f");
    return value.toPrecision(2).replace(/\.0$/, "");
  }

  function bytes(value) {
    if (value === null || value === undefined) return "–";
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let unit = 0;
    while (value >= 1000 && unit < units.length - 1) { value /= 1024; unit += 1; }
    return (unit === 0 ? Math.round(value) : value.toPrecision(3)) + " " + units[unit];
  }

  const perSecond = (value) => (value === null ? "–" : count(value) + "/s");
  const bytesPerSecond = (value) => (value === null ? "–" : bytes(value) + "/s");

  function milliseconds(value) {
    if (value === null) return "–";
    if (value >= 10000) return (value / 1000).toFixed(0) + " s";
    if (value >= 1000) return (value / 1000).toFixed(1) + " s";
    if (value >= 100) return Math.round(value) + " ms";
    return value.toPrecision(2) + " ms";
  }

  function length(seconds) {
    const s = Math.max(0, Math.round(seconds));
    if (s < 60) return s + "s";
    if (s < 3600) return Math.floor(s / 60) + "m " + (s % 60) + "s";
    if (s < 86400) return Math.floor(s / 3600) + "h " + Math.floor(s % 3600 / 60) + "m";
    return Math.floor(s / 86400) + "d " + Math.floor(s % 86400 / 3600) + "h";
  }

  /// "04:38:07", with the day where it isn't today; and how long ago.
  function clock(text, now) {
    const time = new Date(text);
    if (isNaN(time)) return words(text);
    const iso = time.toISOString();
    const sameDay = iso.slice(0, 10) === new Date(now * 1000).toISOString().slice(0, 10);
    return sameDay ? iso.slice(11, 19) : iso.slice(0, 10) + " " + iso.slice(11, 19);
  }

  function since(text, now) {
    const time = Date.parse(text);
    if (isNaN(time)) return "";
    return "since " + clock(text, now) + " (" + length(now - time / 1000) + ")";
  }

  // ---- What was: counters become rates, rates become plots

  const counters = new Map();
  const series = new Map();

  function note(key, time, value) {
    let points = series.get(key);
    if (!points) series.set(key, (points = []));
    if (value === null) return;
    if (points.length && points[points.length - 1][0] >= time) return;
    points.push([time, value]);
    while (points.length && points[0][0] < time - SPAN_S) points.shift();
  }

  /// Of a counter, per second since it was last seen; null for the first look, and after a restart.
  function rate(key, time, value) {
    const before = counters.get(key);
    if (value === null) return null;
    if (before && time - before.time < 0.2) return before.rate;
    let perSecond = null;
    if (before && value >= before.value && time > before.time) perSecond = (value - before.value) / (time - before.time);
    counters.set(key, { time, value, rate: perSecond });
    note(key, time, perSecond);
    return perSecond;
  }

  const of = (key) => series.get(key) || [];

  /// What the server remembers of the time before this page was opened.
  function remember(history) {
    const times = list(history.times).map((time) => Date.parse(time) / 1000);
    const column = (key, values) => {
      const before = list(values).map((value, at) => [times[at], number(value)]).filter(([time, value]) => value !== null && time > 0);
      const since = of(key).filter(([time]) => !before.length || time > before[before.length - 1][0]);
      series.set(key, before.concat(since));
    };
    const { process } = history;
    if (process) {
      for (const [key, name] of [["open", "open"], ["accepted", "connections_per_s"], ["in", "bytes_in_per_s"], ["out", "bytes_out_per_s"], ["faults", "failures_per_s"]]) {
        column(key, process[name]);
      }
    }
    for (const [name, value] of entries(history.listeners)) {
      column("l:" + name, value.connections_per_s);
      if (!value.sessions) continue;
      const sum = (columns) => list(columns[0]).map((_, at) => columns.reduce((sum, column) => (number(column[at]) === null ? sum : (sum ?? 0) + column[at]), null));
      column("ld:" + name, sum([list(value.datagrams_in_per_s), list(value.datagrams_out_per_s)]));
      const drops = entries(value.sessions.dropped_per_s).map(([, values]) => list(values));
      column("lx:" + name, drops.length ? sum(drops) : list(value.sessions.open).map((open) => (number(open) === null ? null : 0)));
    }
    for (const [name, pool] of entries(history.pools)) {
      for (const [address, value] of entries(pool.upstreams)) {
        const key = JSON.stringify([name, address]);
        column("u:" + key, value.connections_per_s);
        column("t:" + key, value.first_byte_ms && value.first_byte_ms.p50);
      }
    }
  }

  // ---- The parts

  let token = "";
  let newest = null;
  let paused = false;
  let heard = 0;
  let failure = "";
  let remembered = false;

  function measure(status) {
    const now = (Date.parse(status.time) || Date.now()) / 1000;
    const model = { now, status, pools: [], listeners: [], ends: [], upstreams: 0, serving: 0 };
    const total = { accepted: null, in: null, out: null, faults: null };
    const add = (name, value) => { if (value !== null) total[name] = (total[name] ?? 0) + value; };
    const ends = new Map();
    // Of UDP sessions apart: what is regular is not the same.
    const ended = (kind, end, times, lately) => {
      const key = kind + end;
      const known = ends.get(key) || { kind, end, times: 0, lately: 0 };
      ends.set(key, { ...known, times: known.times + times, lately: known.lately + (lately || 0) });
    };
    for (const [name, value] of entries(status.listeners)) {
      const listener = { name, value, sessions: value.sessions || null };
      const { sessions } = listener;
      const both = (key, other) => { const of = number(value[key]); return sessions && of !== null ? of + (number(sessions[other]) || 0) : of; };
      listener.open = both("open", "open");
      listener.accepted = both("accepted", "begun");
      listener.rate = rate("l:" + name, now, listener.accepted);
      listener.in = rate("li:" + name, now, both("bytes_in", "bytes_in"));
      listener.out = rate("lo:" + name, now, both("bytes_out", "bytes_out"));
      add("accepted", listener.rate); add("in", listener.in); add("out", listener.out);
      for (const [end, times] of entries(value.ends)) if (number(times) !== null) ended("", end, times, number((value.ends_10m || {})[end]));
      if (sessions) {
        measureSessions(listener, now);
        for (const [end, times] of entries(sessions.ends)) if (number(times) !== null) ended("UDP ", end, times, number((sessions.ends_10m || {})[end]));
      }
      model.listeners.push(listener);
    }
    for (const [key, { kind, end, times, lately }] of ends) {
      const perSecond = rate("e:" + key, now, times);
      const regular = (kind ? REGULAR_SESSION : REGULAR).has(end);
      if (!regular) add("faults", perSecond);
      const seen = recent("e:" + key, times, now);
      // The server's count is complete, ours is up to date.
      model.ends.push({ key, kind, end, times, perSecond, regular, recent: Math.max(seen, lately) });
    }
    looked = true;
    if (total.accepted !== null && total.faults === null) total.faults = 0;
    model.ends.sort((one, other) => other.recent - one.recent || other.times - one.times);
    for (const [name, value] of entries(status.pools)) model.pools.push(measurePool(model, name, value));
    note("accepted", now, total.accepted);
    note("in", now, total.in);
    note("out", now, total.out);
    note("faults", now, total.faults);
    note("open", now, number(status.connections && status.connections.open));
    model.total = total;
    return model;
  }

  /// Datagrams both ways, and those that were dropped, by reason.
  function measureSessions(listener, now) {
    const { name, sessions } = listener;
    listener.datagramsIn = rate("ldi:" + name, now, number(sessions.datagrams_in));
    listener.datagramsOut = rate("ldo:" + name, now, number(sessions.datagrams_out));
    if (listener.datagramsIn !== null && listener.datagramsOut !== null) note("ld:" + name, now, listener.datagramsIn + listener.datagramsOut);
    const dropped = entries(sessions.dropped).filter(([, times]) => number(times) !== null);
    listener.dropping = rate("lx:" + name, now, dropped.reduce((sum, [, times]) => sum + times, 0));
    listener.drops = dropped.map(([reason, times]) => {
      const seen = recent("x:" + name + " " + reason, times, now);
      return { reason, recent: Math.max(seen, number((sessions.dropped_10m || {})[reason]) || 0) };
    }).filter((drop) => drop.recent > 0).sort((one, other) => other.recent - one.recent);
  }

  /// How often in the last ten minutes, as far as this page has seen them. What was not there at its first look was 0.
  const endsSeen = new Map();
  let looked = false;
  function recent(key, value, now) {
    let seen = endsSeen.get(key);
    if (!seen || value < seen[seen.length - 1][1]) endsSeen.set(key, (seen = [[now, looked || seen ? 0 : value]]));
    if (now - seen[seen.length - 1][0] >= 1) seen.push([now, value]);
    while (seen.length > 1 && seen[1][0] <= now - SPAN_S) seen.shift();
    return value - seen[0][1];
  }

  function measurePool(model, name, value) {
    const listeners = model.listeners.filter((listener) => listener.value.pool === name);
    const udp = listeners.some((listener) => listener.sessions);
    const tcp = !udp || listeners.some((listener) => list(listener.value.protocol).includes("tcp"));
    const pool = { name, value, upstreams: [], usable: 0, columns: UPSTREAM.filter(({ of }) => !of || { tcp, udp, "udp alone": !tcp }[of]) };
    for (const upstream of list(value.upstreams)) {
      const address = words(upstream.address);
      const key = JSON.stringify([name, address]);
      const row = { key, pool: name, address, value: upstream };
      row.rate = rate("u:" + key, model.now, number(upstream.connections));
      row.in = rate("ui:" + key, model.now, number(upstream.bytes_in));
      row.out = rate("uo:" + key, model.now, number(upstream.bytes_out));
      row.failing = rate("uf:" + key, model.now, number(upstream.connect_failures));
      note("t:" + key, model.now, number(upstream.now_ms && upstream.now_ms.first_byte));
      // Until two looks can be compared.
      const rates = upstream.rates || {};
      row.rate ??= number(rates.connections_per_s);
      row.in ??= number(rates.bytes_in_per_s);
      row.out ??= number(rates.bytes_out_per_s);
      row.ready = upstream.admin === "enabled" && upstream.health === "healthy" && upstream.weight !== 0;
      row.rank = upstream.health === "unhealthy" || upstream.slow || upstream.header_rejected ? 0 : upstream.admin !== "enabled" ? 1 : upstream.health !== "healthy" ? 2 : 3;
      if (row.ready) pool.usable += 1;
      pool.upstreams.push(row);
    }
    model.upstreams += pool.upstreams.length;
    model.serving += pool.usable;
    return pool;
  }

  // ---- What is wrong now: the server's list, the worst first

  const dropText = (drops) => drops.map((drop) => drop.reason + " " + count(drop.recent)).join(", ");

  function showProblems(model) {
    const found = list(model.status.problems);
    const bad = found.filter((problem) => problem.severity === "bad").length;
    const verdict = byId("verdict");
    dress(verdict, "verdict " + (bad ? "bad" : found.length ? "warn" : "good"));
    const serving = model.serving + " of " + model.upstreams + " upstreams healthy and enabled";
    say(verdict, bad ? (bad === 1 ? "1 problem" : bad + " problems") + ", " + serving : found.length ? serving + ", see below" : "all well: " + serving);
    document.title = (bad ? "(" + bad + ") " : "") + "preface";
    const parent = byId("problems");
    parent.hidden = !found.length;
    const place = ({ pool, upstream }) => [pool && (upstream ? "" : "Pool ") + words(pool), upstream].filter(Boolean).map(words).join(" ");
    // Numbers in `what` change; a problem without a place is known by its words alone.
    const key = (problem) => words(problem.kind) + " " + (place(problem) ? place(problem) + (problem.upstream ? "" : problem.what) : problem.what);
    keep(parent, found, key, () => {
      const node = make("div");
      node.what_ = make("p");
      node.place_ = make("strong");
      node.text_ = make("span");
      node.since_ = make("span", "since");
      node.advice_ = make("p", "advice");
      node.what_.append(node.place_, " ", node.text_, " ", node.since_);
      node.append(node.what_, node.advice_);
      return node;
    }, (node, problem) => {
      dress(node, "problem " + (problem.severity === "bad" ? "bad" : "warn"));
      say(node.place_, place(problem) && place(problem) + ":");
      node.place_.hidden = !place(problem);
      say(node.text_, words(problem.what));
      say(node.since_, problem.since ? since(problem.since, model.now) : "");
      node.since_.hidden = !problem.since;
      tell(node.advice_, words(problem.advice));
      node.advice_.hidden = !problem.advice;
    });
  }

  // ---- Totals

  const TILES = [
    { key: "open", name: "open connections", unit: count },
    { key: "accepted", name: "new connections", unit: perSecond },
    { key: "out", name: "to clients", unit: bytesPerSecond, second: { key: "in", name: "from clients" } },
    { key: "faults", name: "connections that failed", unit: perSecond, fault: true },
  ];

  function showTiles(model) {
    const { status } = model;
    keep(byId("tiles"), TILES, (tile) => tile.key, (tile) => {
      const node = card(null, "");
      node.classList.add("tile");
      node.title_.remove();
      node.figure_ = make("p", "figure");
      node.plot_ = plot(tile.fault && "fault");
      node.append(node.figure_, node.plot_);
      return node;
    }, (node, tile) => {
      const open = status.connections && number(status.connections.open);
      const value = tile.key === "open" ? open : model.total[tile.key];
      say(node.figure_, value === null || value === undefined ? "–" : tile.unit(value));
      let name = tile.name;
      const max = status.connections && number(status.connections.max);
      if (tile.key === "open" && max) name += ", at most " + count(max);
      if (tile.second) name += "; " + bytesPerSecond(model.total[tile.second.key]) + " " + tile.second.name;
      say(node.about_, name);
      if (tile.fault) node.figure_.classList.toggle("count-bad", value > 0);
      draw(node.plot_, of(tile.key), model.now, tile.unit);
    });
  }

  // ---- Pools and their upstreams

  const UPSTREAM = [
    { key: "address", name: "upstream", className: "address" },
    { key: "state", name: "state", className: "state" },
    { key: "open", name: "open", number: true },
    { key: "rate", name: "new", number: true },
    { key: "plot", name: "10 min: new, first byte", of: "tcp" },
    { key: "plot", name: "last 10 min", of: "udp alone" },
    { key: "bytes", name: "in, out", number: true },
    { key: "connect", name: "connect p50, p99", number: true, of: "tcp" },
    { key: "first", name: "first byte p50, p99", number: true, of: "tcp" },
    { key: "trip", name: "UDP round trip p50, p99", number: true, of: "udp" },
    { key: "failures", name: "failed connects", number: true },
    { key: "orders", name: "", className: "orders" },
  ];

  function showPools(model) {
    keep(byId("pools"), model.pools, (pool) => pool.columns.length + pool.name, (pool) => {
      const node = card(null, "Pool " + pool.name);
      node.opener_ = opener(() => node.pool_);
      node.title_.parentElement.append(node.opener_);
      node.times_ = make("div");
      node.table_ = table(pool.columns);
      node.more_ = make("p", "quiet");
      node.append(node.times_, node.table_, node.more_);
      return node;
    }, (node, pool) => {
      const rows = pool.upstreams.length > UPSTREAMS_MAX ? pool.upstreams.slice().sort((one, other) => one.rank - other.rank) : pool.upstreams;
      // One scale for all of a pool: what is slow beside its siblings looks it.
      const slowest = pool.upstreams.reduce((most, upstream) => of("t:" + upstream.key).reduce((most, [, time]) => Math.max(most, time), most), 0);
      let about = pool.usable + " of " + pool.upstreams.length + " healthy and enabled";
      if (pool.value.balance) about += ", " + words(pool.value.balance);
      for (const name of list(pool.value.names).slice(0, 5)) about += ", " + words(name.name) + " is " + list(name.addresses).length;
      about += latencies(pool.value);
      say(node.about_, about);
      node.pool_ = pool;
      pool.key = pool.name;
      showOpener(node.opener_, pool);
      keep(node.times_, openedTimes.has(pool.key) ? [pool] : [], (pool) => pool.key, () => table(TIMES), (node, pool) => showTimes(node, pool.value));
      say(node.more_, rows.length > UPSTREAMS_MAX ? (rows.length - UPSTREAMS_MAX) + " more, in no worse state: see /status" : "");
      const items = [];
      for (const upstream of rows.slice(0, UPSTREAMS_MAX)) {
        items.push({ key: upstream.key, upstream });
        if (openedTimes.has(upstream.key)) items.push({ key: "times " + upstream.key, upstream, isDetail: true });
      }
      keep(node.table_.rows_, items, (item) => item.key, (item) => (item.isDetail ? timesRow(pool.columns.length) : upstreamRow(pool.columns)), (tr, { upstream, isDetail }) => {
        if (isDetail) showTimes(tr.table_, upstream.value);
        else showUpstream(tr, upstream, model, slowest);
      });
    });
  }

  // ---- Every figure of a pool's or an upstream's durations

  const FIGURES = [["p50", "p50"], ["p90", "p90"], ["p99", "p99"], ["p999", "p99.9"], ["max", "max"]];
  const PERIODS = [["last_minute", "last minute"], ["since_start", "since the start"]];
  const KINDS = [["connect", "connect"], ["first_byte", "first byte"], ["duration", "connection"], ["round_trip", "UDP round trip"], ["session", "UDP session"], ["health_check", "health check"]];
  const TIMES = [{ key: "kind", name: "time" }, { key: "period", name: "of" }, ...FIGURES.map(([key, name]) => ({ key, name, number: true })), { key: "count", name: "measured", number: true }];
  const openedTimes = new Set();   // keys of upstreams, names of pools

  function opener(whose) {
    const button = make("button", "row-button", "all times");
    button.type = "button";
    button.addEventListener("click", () => {
      const { key } = whose();
      if (!openedTimes.delete(key)) openedTimes.add(key);
      if (newest) showPools(newest);
    });
    return button;
  }

  function showOpener(button, { key, value }) {
    button.hidden = !measuredTimes(value).length;
    button.setAttribute("aria-expanded", String(openedTimes.has(key)));
  }

  function measuredTimes(value) {
    const times = [];
    for (const [kind, name] of KINDS) {
      for (const [period, of] of PERIODS) {
        const figures = value.latency && value.latency[kind + "_ms"] && value.latency[kind + "_ms"][period];
        if (figures) times.push({ key: kind + " " + period, name, of, figures });
      }
    }
    return times;
  }

  function timesRow(columns) {
    const node = make("tr");
    const cell = make("td", "detail");
    cell.colSpan = columns;
    cell.append((node.table_ = table(TIMES)));
    node.append(cell);
    return node;
  }

  function showTimes(node, value) {
    node.className = "times";
    keep(node.rows_, measuredTimes(value), (time) => time.key, () => row(TIMES), ({ cells_ }, { name, of, figures }) => {
      say(cells_.kind, name);
      say(cells_.period, of);
      for (const [key] of FIGURES) say(cells_[key], milliseconds(number(figures[key])));
      say(cells_.count, count(number(figures.count)));
    });
  }

  function upstreamRow(columns) {
    const node = row(columns);
    const { address, state, plot: cell, bytes, connect, first, trip, orders } = node.cells_;
    address.append((node.address_ = make("strong")), (node.traits_ = make("span", "quiet line")), (node.opener_ = opener(() => node.upstream_)));
    state.append((node.health_ = make("span")), document.createTextNode(" "), (node.admin_ = make("span")), document.createTextNode(" "), (node.fault_ = make("span", "badge bad")), (node.why_ = make("span", "quiet line")), (node.ordered_ = make("span", "quiet line")));
    const plots = make("span", "plots");
    plots.append((node.plot_ = plot()), (node.waits_ = plot("time")));
    cell.append(plots);
    const lines = (cell) => { const two = [make("span", "line"), make("span", "line")]; cell.append(...two); return two; };
    [node.in_, node.out_] = lines(bytes);
    node.times_ = [[connect, "connect"], [first, "first_byte"], [trip, "round_trip"]].filter(([cell]) => cell).map(([cell, kind]) => [lines(cell), kind]);
    for (const order of ["drain", "disable", "enable"]) {
      const button = make("button", "", order[0].toUpperCase() + order.slice(1));
      button.type = "button";
      button.dataset.order = order;
      button.addEventListener("click", () => give(order, node.upstream_));
      orders.append(button);
      node[order + "_"] = button;
    }
    return node;
  }

  const HEALTH = { healthy: "good", unhealthy: "bad" };
  const ADMIN = { enabled: "", draining: "warn", disabled: "warn" };

  function showUpstream(node, upstream, model, slowest) {
    const { value, address } = upstream;
    const cells = node.cells_;
    node.upstream_ = upstream;
    node.dataset.address = address;
    node.dataset.pool = upstream.pool;
    say(node.address_, words(value.name) && value.name !== address ? words(value.name) + " " + address : address);
    const traits = [];
    if (value.header !== undefined) traits.push("header " + words(value.header));
    if (value.weight !== undefined && value.weight !== 1) traits.push("weight " + words(value.weight));
    if (value.backup) traits.push("backup");
    say(node.traits_, traits.join(", "));
    showOpener(node.opener_, upstream);
    dress(node, openedTimes.has(upstream.key) ? "open" : "");
    dress(node.health_, "badge " + (HEALTH[value.health] || ""));
    say(node.health_, words(value.health) || "–");
    dress(node.admin_, "badge " + (ADMIN[value.admin] || ""));
    say(node.admin_, words(value.admin) || "–");
    const faults = [value.slow && "slow", value.header_rejected && (value.header_rejected.certain === false ? "never answers" : "header rejected")].filter(Boolean).join(", ");
    say(node.fault_, faults);
    node.fault_.hidden = !faults;
    say(node.why_, [words(value.health_reason).split("; header rejected?")[0], since(value.health_since, model.now)].filter(Boolean).join(", "));
    const by = value.admin_by ? " by " + words(value.admin_by) : "";
    say(node.ordered_, value.admin_since ? words(value.admin) + " " + since(value.admin_since, model.now) + by : "");
    say(cells.open, count(number(value.open)));
    say(cells.rate, perSecond(upstream.rate));
    say(node.in_, bytesPerSecond(upstream.in));
    say(node.out_, bytesPerSecond(upstream.out));
    for (const [lines, kind] of node.times_) {
      const { p50, p99 } = measured(value, kind);
      const isSlow = Boolean(value.slow && value.slow.phase === kind);
      // The last minute may have been quicker than now.
      say(lines[0], isSlow ? milliseconds(number(value.slow.now_ms)) + " now" : milliseconds(number(p50)));
      say(lines[1], milliseconds(number(p99)));
      lines[0].classList.toggle("count-bad", isSlow);
    }
    const failures = number(value.connect_failures);
    say(cells.failures, count(failures) + (upstream.failing > 0 ? ", " + perSecond(upstream.failing) : ""));
    cells.failures.classList.toggle("count-bad", upstream.failing > 0);
    draw(node.plot_, of("u:" + upstream.key), model.now, perSecond, { what: "new connections" });
    draw(node.waits_, of("t:" + upstream.key), model.now, milliseconds, { what: "first byte, median", atLeast: slowest });
    node.drain_.hidden = value.admin !== "enabled";
    node.disable_.hidden = value.admin === "disabled" || !value.admin;
    node.enable_.hidden = value.admin === "enabled" || !value.admin;
  }

  /// Of the last minute.
  function measured(value, kind) {
    const times = value.latency && value.latency[kind + "_ms"];
    return (times && times.last_minute) || {};
  }

  function percentiles(value, kind) {
    const { p50, p99 } = measured(value, kind);
    return number(p50) === null ? "–" : milliseconds(p50) + " / " + milliseconds(number(p99));
  }

  function latencies(value) {
    const told = [["connect", "connect"], ["first_byte", "first byte"], ["round_trip", "UDP round trip"]].map(([kind, name]) => [name, percentiles(value, kind)]);
    const text = told.filter(([, times]) => times !== "–").map(([name, times]) => name + " " + times).join(", ");
    return text && "; p50 / p99 of the last minute: " + text;
  }

  // ---- Listeners, ends, reloads

  const LISTENER = [
    { key: "name", name: "listener", className: "address" },
    { key: "bind", name: "address" },
    { key: "pool", name: "pool" },
    { key: "open", name: "open", number: true },
    { key: "rate", name: "new", number: true },
    { key: "plot", name: "last 10 min" },
    { key: "bytes", name: "in / out", number: true },
    { key: "datagrams", name: "datagrams in / out, dropped", number: true },
    { key: "total", name: "accepted", number: true },
    { key: "headers", name: "headers sent", number: true },
  ];

  function showListeners(model) {
    const parent = byId("listeners");
    if (!parent.card_) { parent.card_ = card(parent, "Listeners"); parent.card_.append((parent.table_ = table(LISTENER))); }
    keep(parent.table_.rows_, model.listeners, (listener) => (listener.sessions ? "udp " : "tcp ") + listener.name, (listener) => {
      const node = row(LISTENER);
      node.cells_.name.append(make("strong", "", listener.name));
      node.cells_.plot.append((node.plot_ = plot()));
      if (listener.sessions) {
        node.cells_.plot.append((node.datagrams_ = plot()), (node.drops_ = plot(true)));
        node.cells_.datagrams.append((node.passed_ = make("span", "line")), (node.dropped_ = make("span", "line")));
      }
      return node;
    }, (node, listener) => {
      const { name, value, rate, in: into, out } = listener;
      const cells = node.cells_;
      say(cells.bind, list(value.bind).map(words).join(", ") + (listener.sessions ? " " + list(value.protocol).map(words).join(" and ") : ""));
      say(cells.pool, words(value.pool));
      say(cells.open, count(listener.open));
      say(cells.rate, perSecond(rate));
      say(cells.bytes, bytesPerSecond(into) + " / " + bytesPerSecond(out));
      say(cells.total, count(listener.accepted));
      if (listener.sessions) showSessions(node, listener, model.now);
      say(cells.headers, entries(value.headers).filter(([, sent]) => sent).map(([version, sent]) => version + " " + count(sent)).join(", ") || "none");
      draw(node.plot_, of("l:" + name), model.now, perSecond);
    });
  }

  /// Sessions begun are in the plot of new ones; below it datagrams both ways, and drops where there are any.
  function showSessions(node, listener, now) {
    const { name, drops } = listener;
    say(node.passed_, perSecond(listener.datagramsIn) + " / " + perSecond(listener.datagramsOut));
    say(node.dropped_, drops.length ? "dropped " + perSecond(listener.dropping) + "; last 10 min: " + dropText(drops) : "none dropped");
    node.dropped_.classList.toggle("count-bad", listener.dropping > 0);
    draw(node.datagrams_, of("ld:" + name), now, (value) => count(value) + " datagrams/s");
    draw(node.drops_, of("lx:" + name), now, (value) => count(value) + " drops/s");
    node.drops_.style.display = drops.length ? "" : "none";
  }

  const END = [
    { key: "end", name: "end", className: "address" },
    { key: "recent", name: "last 10 min", number: true },
    { key: "rate", name: "now", number: true },
    { key: "total", name: "since the start", number: true },
  ];

  function showEnds(model) {
    const parent = byId("ends");
    if (!parent.card_) {
      parent.card_ = card(parent, "How connections and sessions end");
      parent.card_.append((parent.table_ = table(END)), (parent.none_ = make("p", "quiet", "none has ended yet")));
    }
    parent.none_.hidden = model.ends.length > 0;
    parent.table_.hidden = !model.ends.length;
    keep(parent.table_.rows_, model.ends, (end) => end.key, (end) => {
      const node = row(END);
      node.cells_.end.append(make("span", "quiet", end.kind), make("span", "mono", end.end));
      return node;
    }, (node, end) => {
      say(node.cells_.recent, count(end.recent));
      say(node.cells_.rate, perSecond(end.perSecond));
      say(node.cells_.total, count(end.times));
      node.cells_.recent.classList.toggle("count-bad", !end.regular && end.recent > 0);
    });
  }

  const OUTCOME = { applied: "good", refused: "bad" };

  function showReloads(model) {
    const parent = byId("reloads");
    if (!parent.card_) { parent.card_ = card(parent, "Reloads"); parent.card_.append((parent.rows_ = make("div", "scroll"))); }
    const reloads = list(model.status.reloads);
    say(parent.card_.about_, reloads.length ? words(model.status.config) : "none since the start; " + words(model.status.config));
    keep(parent.rows_, reloads, (reload) => words(reload.time) + words(reload.outcome), (reload) => {
      const node = make("div");
      node.append(make("span", "badge " + (OUTCOME[reload.outcome] || ""), words(reload.outcome)), " ");
      node.append((node.when_ = make("span", "quiet")));
      const lines = [...list(reload.changes), ...list(reload.errors)].map(words);
      if (lines.length) node.append(make("pre", "", lines.join("\n")));
      return node;
    }, (node, reload) => {
      const ago = length(model.now - Date.parse(reload.time) / 1000);
      say(node.when_, clock(reload.time, model.now) + ", " + ago + " ago, by " + words(reload.trigger));
    });
  }

  // ---- Recent connections, and the header of each

  const TAP = [
    { key: "accepted", name: "accepted", className: "address" },
    { key: "client", name: "client" },
    { key: "listener", name: "listener" },
    { key: "upstream", name: "upstream" },
    { key: "header", name: "header sent" },
    { key: "bytes", name: "in / out", number: true },
    { key: "first", name: "first byte", number: true },
    { key: "end", name: "end" },
  ];
  let opened = null;               // the connection whose header is shown; meanwhile the list stays as it is

  function showTap(connections) {
    const parent = byId("tap");
    parent.hidden = false;
    if (!parent.card_) {
      parent.card_ = card(parent, "Recent connections and sessions");
      parent.card_.append((parent.table_ = table(TAP)), (parent.none_ = make("p", "quiet", "none yet")));
    }
    parent.none_.hidden = connections.length > 0;
    say(parent.card_.about_, opened ? "the list stays as it is while a header is open" : "the newest first; a header opens field by field");
    const newestFirst = connections.slice().sort((one, other) => (words(one.id) < words(other.id) ? 1 : -1)).slice(0, TAP_ROWS);
    const items = [];
    for (const connection of newestFirst) {
      items.push({ key: words(connection.id), connection });
      if (opened === words(connection.id)) items.push({ key: "detail " + connection.id, connection, detail: true });
    }
    keep(parent.table_.rows_, items, (item) => item.key, (item) => (item.detail ? tapDetail(item.connection) : tapRow()), (node, { connection, detail }) => {
      if (detail) return;
      const cells = node.cells_;
      const now = newest ? newest.now : Date.now() / 1000;
      node.connection_ = connection;
      dress(node, opened === words(connection.id) ? "open" : "");
      say(cells.accepted, clock(connection.accepted, now));
      say(cells.client, words(connection.client));
      const udp = connection.protocol === "udp";
      say(cells.listener, words(connection.listener) + (udp ? " (UDP)" : ""));
      say(cells.upstream, [connection.pool, connection.upstream].filter(Boolean).map(words).join(" "));
      const header = connection.header;
      say(node.button_, header ? words(header.version) + ", " + count(number(header.bytes)) + " bytes" : "none");
      node.button_.disabled = !header;
      node.button_.setAttribute("aria-expanded", String(opened === words(connection.id)));
      say(cells.bytes, bytes(number(connection.bytes_in)) + " / " + bytes(number(connection.bytes_out)));
      say(cells.first, milliseconds(number(connection.first_byte_ms)));
      say(cells.end, words(connection.end) || "open for " + length((connection.age_ms || 0) / 1000));
      cells.end.classList.toggle("count-bad", Boolean(connection.end) && !(udp ? REGULAR_SESSION : REGULAR).has(connection.end));
    });
    parent.connections_ = connections;
  }

  function tapRow() {
    const node = row(TAP);
    node.cells_.header.append((node.button_ = make("button", "row-button")));
    node.button_.type = "button";
    node.button_.addEventListener("click", () => {
      const id = words(node.connection_.id);
      opened = opened === id ? null : id;
      showTap(byId("tap").connections_);
    });
    return node;
  }

  function tapDetail({ header, id }) {
    const node = make("tr");
    const cell = make("td", "detail");
    cell.colSpan = TAP.length;
    const facts = make("dl");
    const tell = (name, value) => facts.append(make("dt", "", words(name)), make("dd", "", words(value)));
    tell("id", id);
    list(header.facts).forEach((fact) => tell(fact.name, fact.value));
    const fields = table([{ name: "at" }, { name: "bytes" }, { name: "field" }]);
    for (const field of list(header.fields)) {
      const line = make("tr");
      for (const [name, text, className] of [["at", words(field.at), "mono"], ["bytes", words(field.hex), "mono"], ["field", words(field.meaning), ""]]) {
        const part = make("td", className, text);
        part.dataset.label = name;
        line.append(part);
      }
      fields.rows_.append(line);
    }
    cell.append(facts, fields, make("pre", "quiet", "preface decode " + words(header.hex)));
    node.append(cell);
    return node;
  }

  async function lookAtTap() {
    for (;;) {
      if (heard && !paused && !opened && !document.hidden) {
        try {
          const response = await call("GET", "/tap?limit=" + TAP_ROWS);
          if (response.status === 404) return;
          if (response.ok && !opened) showTap(list((await response.json()).connections));
        } catch { /* the line at the top says that nothing answers */ }
      }
      await new Promise((resolve) => setTimeout(resolve, heard ? TAP_EVERY_MS : 300));
    }
  }

  function show() {
    if (!newest) return;
    const { status, now } = newest;
    const about = [];
    if (status.version) about.push(words(status.version));
    if (status.pid) about.push("pid " + words(status.pid));
    if (status.started) about.push("up " + length(now - Date.parse(status.started) / 1000));
    say(byId("about"), about.join(", "));
    showProblems(newest);
    showTiles(newest);
    showPools(newest);
    showListeners(newest);
    showEnds(newest);
    showReloads(newest);
  }

  // ---- Orders, and questions to the operator

  /// Resolves to the text that was typed (or "yes"), or to null.
  function ask({ title, text, sure, secret }) {
    const dialog = byId("ask");
    const input = dialog.querySelector("input");
    say(dialog.querySelector("h2"), title);
    say(dialog.querySelector("p"), text);
    say(dialog.querySelector(".sure"), sure);
    dialog.querySelector("[value=no]").hidden = !secret && sure === "Close";
    input.hidden = !secret;
    input.value = "";
    if (dialog.open) dialog.close("no");
    dialog.returnValue = "no";
    return new Promise((resolve) => {
      dialog.addEventListener("close", () => {
        const answer = dialog.returnValue === "yes" ? (secret ? input.value.trim() : "yes") : null;
        input.value = "";
        resolve(answer);
      }, { once: true });
      dialog.showModal();
      if (secret) input.focus();
    });
  }

  // Enter in the token's field means yes, not the first button.
  byId("ask").querySelector("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); byId("ask").close("yes"); }
  });

  let asking = null;
  function askToken(why) {
    asking ||= ask({ title: "Token", text: why + "\nIt is kept in this page until it is closed.", sure: "Go on", secret: true })
      .then((typed) => { asking = null; if (typed) token = typed; return typed; });
    return asking;
  }

  async function call(method, path, signal) {
    for (;;) {
      const headers = method === "GET" ? {} : { "X-Preface": "1" };
      if (token) headers.Authorization = "Bearer " + token;
      const response = await fetch(path, { method, headers, signal, cache: "no-store", credentials: "omit" });
      if (response.status !== 401) return response;
      const said = await response.json().catch(() => ({}));
      if (!(await askToken("The admin API wants the token in the file of [admin] token_file" + (token ? ": " + words(said.error) : ".")))) return response;
    }
  }

  const MEANING = {
    drain: "It takes no new connections; those that are open stay.",
    disable: "It takes no new connections, and those that are open are reset now.",
    enable: "It takes new connections as its health allows.",
  };

  async function give(order, upstream) {
    const open = number(upstream.value.open);
    const others = newest.pools.find((pool) => pool.name === upstream.pool);
    let text = "Pool " + upstream.pool + ", " + count(open) + " open. " + MEANING[order];
    if (order !== "enable" && upstream.ready && others && others.usable === 1) text += "\nIt is the last healthy and enabled upstream of this pool.";
    const title = order[0].toUpperCase() + order.slice(1) + " " + upstream.address + "?";
    if (!(await ask({ title, text, sure: title.split(" ")[0] }))) return;
    try {
      const path = "/pools/" + encodeURIComponent(upstream.pool) + "/upstreams/" + encodeURIComponent(upstream.address) + "/" + order;
      const response = await call("POST", path);
      if (!response.ok) {
        const said = await response.json().catch(() => ({}));
        throw new Error(words(said.error) || "the answer is " + response.status);
      }
    } catch (error) {
      await ask({ title: "Not done", text: error.message, sure: "Close" });
    }
  }

  // ---- Events. Read with fetch, because an EventSource cannot carry the token.

  async function follow() {
    const response = await call("GET", "/events");
    if (!response.ok) {
      const said = await response.json().catch(() => ({}));
      throw new Error(words(said.error) || "the answer is " + response.status);
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        text = text.slice(end + 2);
        if (data) take(JSON.parse(data));
      }
    }
  }

  function take(status) {
    heard = Date.now();
    // For tests: so many events have come.
    document.documentElement.dataset.events = String(Number(document.documentElement.dataset.events || 0) + 1);
    failure = "";
    const model = measure(status);
    // A server without rates has no history either.
    if (!remembered && status.rates) {
      remembered = true;
      call("GET", "/history").then((response) => response.ok && response.json().then(remember)).catch(() => { remembered = false; });
    }
    if (!paused) { newest = model; show(); }
    showLive();
  }

  async function followForEver() {
    for (let pause = 1000; ; pause = Math.min(pause * 2, 10000)) {
      const before = heard;
      try { await follow(); } catch (error) { failure = error.message; }
      if (heard !== before) pause = 500;
      showLive();
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  function showLive() {
    const node = byId("live");
    const late = heard && Date.now() - heard > STALE_MS;
    if (late || (failure && !heard)) {
      dress(node, "live bad");
      say(node, heard ? "no answer for " + length((Date.now() - heard) / 1000) : failure || "no answer");
    } else if (paused) {
      dress(node, "live warn");
      say(node, "paused at " + new Date(newest ? newest.now * 1000 : Date.now()).toISOString().slice(11, 19));
    } else if (heard) {
      dress(node, "live good");
      say(node, "live " + new Date(heard).toISOString().slice(11, 19));
    }
  }

  byId("pause").addEventListener("click", () => {
    paused = !paused;
    byId("pause").setAttribute("aria-pressed", String(paused));
    say(byId("pause"), paused ? "Go on" : "Pause");
    showLive();
  });
  setInterval(showLive, 1000);
  followForEver();
  lookAtTap();
})();
