// Somebody else's client: finds a service by the NATS service protocol and calls one of its endpoints.
// Usage: node services_client.mjs <node_modules folder> <server url> <service name> <subject> <request>
// Prints one JSON object {pings, infos, stats, answer, refusal}.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, url, name, subject, request] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${modules}/`));
const { connect } = require("@nats-io/transport-node");
const { Svcm } = require("@nats-io/services");

async function all(iterator) {
  const found = [];
  for await (const one of iterator) found.push(one);
  return found;
}

const connection = await connect({ servers: url });
const client = new Svcm(connection).client({ strategy: "stall", maxWait: 2000 });
const pings = await all(await client.ping());
const infos = await all(await client.info(name));
const answer = await connection.request(subject, request, { timeout: 5000 });
const refusal = await connection.request(subject, "[not an object", { timeout: 5000 });
const stats = await all(await client.stats(name, pings.find((one) => one.name === name).id));
console.log(JSON.stringify({
  pings,
  infos,
  stats,
  answer: answer.json(),
  refusal: {
    code: refusal.headers?.get("Nats-Service-Error-Code"),
    text: refusal.headers?.get("Nats-Service-Error"),
  },
}));
await connection.close();
