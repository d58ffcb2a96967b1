// One real JavaScript client: `node ask.mjs CLIENT` reads {"url", "texts"} and writes {"vectors"}; with errors-of-CLIENT
// it sends each text alone, and writes what the client throws for it.

import { OpenAIEmbeddings } from "@langchain/openai";
import OpenAI from "openai";

const model = "text-embedding-3-small";

async function openai(url, texts, choices = {}) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "dummy", maxRetries: 0 });
  const reply = await client.embeddings.create({ model, input: texts, ...choices });
  return reply.data.map((one) => one.embedding);
}

async function langchain(url, texts) {
  const configuration = { baseURL: `${url}/v1` };
  const client = new OpenAIEmbeddings({ model, apiKey: "dummy", maxRetries: 0, configuration });
  return client.embedDocuments(texts);
}

const clients = {
  openai,
  "openai-floats": (url, texts) => openai(url, texts, { encoding_format: "float" }),
  langchain,
};

async function errorsOf(client, url, texts) {
  const thrown = [];
  for (const text of texts) {
    try {
      await client(url, [text]);
    } catch (problem) {
      thrown.push({ class: problem.constructor.name, status: problem.status, message: problem.message });
    }
  }
  return thrown;
}

const name = process.argv[2];
const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const { url, texts } = JSON.parse(Buffer.concat(chunks));
const client = clients[name.replace("errors-of-", "")];
const written = name.startsWith("errors-of-") ? await errorsOf(client, url, texts) : { vectors: await client(url, texts) };
console.log(JSON.stringify(written));
