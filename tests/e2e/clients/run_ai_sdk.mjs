// The AI SDK: a tool task, its continuation, objects, a stop, and embeddings, over two of its providers.
// Arguments: BASE_URL MODEL responses|compatible work|resume|object|stop|embed STATE_FILE TASK.
// Prints one line of JSON.
import { readFileSync, writeFileSync } from "node:fs";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, isStepCount, jsonSchema, Output, streamText, tool } from "ai";

const [baseURL, name, provider, phase, state, task] = process.argv.slice(2);
const models =
  provider === "responses"
    ? createOpenAI({ baseURL, apiKey: "any" })
    : createOpenAICompatible({
        name: "local", baseURL, apiKey: "any", includeUsage: true, supportsStructuredOutputs: true,
      });
const model = models(name);

const report = jsonSchema({
  type: "object",
  properties: { file: { type: "string" }, words: { type: "integer" } },
  required: ["file", "words"],
  additionalProperties: false,
});
const tools = {
  write_file: tool({
    description: "Write a text file.",
    inputSchema: jsonSchema({
      type: "object",
      properties: { path: { type: "string" }, text: { type: "string" } },
      required: ["path", "text"],
      additionalProperties: false,
    }),
    execute: async ({ path, text }) => {
      writeFileSync(path, text);
      return `${text.length} characters written to ${path}`;
    },
  }),
};

const history = phase === "resume" ? JSON.parse(readFileSync(state, "utf8")) : [];
const messages = [...history, { role: "user", content: task }];
const stop = new AbortController();
const options = {
  model, messages, instructions: "You write files.", tools, stopWhen: isStepCount(5), maxRetries: 0,
  abortSignal: stop.signal,
};

async function work() {
  const format = phase === "object" ? { output: Output.object({ schema: report }) } : {};
  // A stream the first time, whole answers when it goes on: both ways of the SDK are tried.
  const run = phase === "work" ? streamText(options) : await generateText({ ...options, ...format });
  const steps = await run.steps;
  const answers = (await run.responseMessages) ?? (await run.response).messages;
  writeFileSync(state, JSON.stringify([...messages, ...answers]));
  return {
    output: phase === "object" ? run.output : await run.text,
    prompts: steps.map((step) => step.usage.inputTokens),
    cached: steps.map((step) => step.usage.inputTokenDetails.cacheReadTokens),
  };
}

async function stopped() {
  const run = streamText({ ...options, onError: () => {} });
  let ends = "";
  for await (const part of run.stream ?? run.fullStream) {
    if (part.type === "text-delta") stop.abort();
    ends = part.type;
  }
  return { ends };
}

async function embedded() {
  const found = await embedMany({
    model: models.embeddingModel(name), values: task.split("\n"), maxRetries: 0,
  });
  return { vectors: found.embeddings, tokens: found.usage.tokens };
}

const phases = { stop: stopped, embed: embedded };
console.log(JSON.stringify(await (phases[phase] ?? work)()));
