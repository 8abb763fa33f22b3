// Drives Chromium for tests: node drive.mjs PLAYWRIGHT CHROMIUM FLAG...
//
// PLAYWRIGHT is the folder of playwright-core. Each line of the standard input is a command,
// {"do": NAME, ...}, which is answered by a line with {"value"} or {"error"}.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as pause } from "node:timers/promises";

const [playwright, executablePath, ...args] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(playwright);
const browser = await chromium.launch({ executablePath, args });

let page; // of the last "open", in a context of its own
let log; // {requests, complaints} of the page

const COMMANDS = {
  async open({ url, width = 1000, height = 800, dark = false, permissions = [], before = "" }) {
    await page?.context().close();
    const context = await browser.newContext({
      viewport: { width, height },
      colorScheme: dark ? "dark" : "light",
      permissions,
    });
    page = await context.newPage();
    log = { requests: [], complaints: [] };
    page.on("request", (request) => log.requests.push(request.url()));
    page.on("pageerror", (error) => log.complaints.push(error.message));
    page.on("console", (message) => {
      if (["error", "warning"].includes(message.type())) log.complaints.push(message.text());
    });
    if (before) await page.addInitScript(before);
    await page.goto(url);
  },
  evaluate: ({ code }) => page.evaluate(code),
  // Not waitForFunction, which the page's Content-Security-Policy forbids.
  async wait({ code, timeout }) {
    for (const end = Date.now() + timeout; !(await page.evaluate(code)); await pause(20)) {
      if (Date.now() > end) throw new Error(`never true: ${code}\n${await COMMANDS.tree({})}`);
    }
  },
  choose: ({ files }) => page.setInputFiles("input[type=file]", files),
  async drop({ files }) {
    const contents = files.map((file) => [basename(file), readFileSync(file).toString("base64")]);
    const dataTransfer = await page.evaluateHandle(async (pairs) => {
      const transfer = new DataTransfer();
      for (const [name, text] of pairs) {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], name));
      }
      return transfer;
    }, contents);
    await page.dispatchEvent("label", "drop", { dataTransfer });
  },
  press: ({ key }) => page.keyboard.press(key),
  click: ({ selector }) => page.click(selector),
  reload: async () => void (await page.reload()),
  tree: ({ selector = "body" }) => page.locator(selector).ariaSnapshot(),
  screenshot: async ({ file }) => void (await page.screenshot({ path: file, fullPage: true })),
  log: () => log,
};

for await (const line of createInterface({ input: process.stdin })) {
  const { do: name, ...values } = JSON.parse(line);
  let answer;
  try {
    answer = { value: (await COMMANDS[name](values)) ?? null };
  } catch (error) {
    answer = { error: error.message };
  }
  console.log(JSON.stringify(answer));
}
await browser.close();
