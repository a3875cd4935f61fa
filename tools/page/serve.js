// The chat of tools/serve.py. The conversation is kept here, in OpenAI's form; each request sends all of it.
const byId = id => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token");
const panel = new Panel(byId("panel"), 0);
let messages = [], pictures = [], running = null;

byId("model").textContent = JSON.parse(byId("data").textContent).model;

function picture(url) {
  const image = el("img", {src: url, alt: "attached image"});
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth <= 160);
  return image;
}

function showPictures() {
  byId("pictures").replaceChildren(...pictures.map((url, i) => {
    const button = el("button", {type: "button", title: "remove this image"}, picture(url));
    button.onclick = () => { pictures.splice(i, 1); showPictures(); };
    return button;
  }));
}

function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.onload = () => { pictures.push(reader.result); showPictures(); };
    reader.readAsDataURL(file);
  }
}

byId("file").onchange = () => { addFiles(byId("file").files); byId("file").value = ""; };
document.ondragover = event => { event.preventDefault(); document.body.classList.add("drop"); };
document.ondragleave = event => { if (!event.relatedTarget) document.body.classList.remove("drop"); };
document.ondrop = event => {
  event.preventDefault();
  document.body.classList.remove("drop");
  addFiles(event.dataTransfer.files);
};
document.onpaste = event => addFiles(event.clipboardData.files);

function setRunning(controller) {
  running = controller;
  byId("send").disabled = Boolean(controller);
  byId("stop").disabled = !controller;
  byId("new").disabled = Boolean(controller);
}

// Read the events of a stream: call got(object) for each, until [DONE]
async function readEvents(body, got) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Error("the server ended the answer early");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      got(found);
    }
  }
}

async function send() {
  const question = byId("text").value.trim(), sent = pictures;
  if (running || !question && !sent.length) return;
  const content = [...sent.map(url => ({type: "image_url", image_url: {url}})), {type: "text", text: question}];
  const asked = el("div", {class: "user"}, ...sent.map(picture), el("div", {class: "text"}, question));
  const reply = el("div", {class: "card reply text"});
  byId("talk").append(asked, reply);
  byId("text").value = "";
  pictures = [];
  showPictures();
  const controller = new AbortController();
  setRunning(controller);
  let text = "", record = null, failed = "", stopped = false;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", signal: controller.signal,
      headers: {"Content-Type": "application/json", ...(token ? {Authorization: `Bearer ${token}`} : {})},
      body: JSON.stringify({messages: [...messages, {role: "user", content}], stream: true, look: true,
                            temperature: byId("temperature").valueAsNumber || 0,
                            max_tokens: byId("tokens").valueAsNumber || null}),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    await readEvents(response.body, found => {
      text += found.choices[0].delta.content || "";
      record = found.look || record;
      reply.textContent = text;
    });
  } catch (error) {
    stopped = controller.signal.aborted;
    failed = stopped ? "" : String(error.message || error);
  }
  setRunning(null);
  if (failed) {                                   // the question goes back, to be changed and sent again
    reply.classList.add("bad");
    reply.textContent = failed;
    byId("text").value = byId("text").value || question;
    pictures = pictures.length ? pictures : sent;
    showPictures();
    return;
  }
  messages.push({role: "user", content}, {role: "assistant", content: text});
  if (stopped) reply.append(el("div", {class: "quiet"}, "stopped"));
  if (!record) return;
  const view = answerView(record, panel);
  reply.classList.remove("text");
  reply.replaceChildren(view, promptView(record));
  if (view.firstChild) view.firstChild.click();
}

byId("form").onsubmit = event => { event.preventDefault(); send(); };
byId("text").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
byId("stop").onclick = () => running && running.abort();
byId("new").onclick = () => {
  messages = [];
  byId("talk").replaceChildren();
  panel.clear();
};
