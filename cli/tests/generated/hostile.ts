// Calls the service `Result.v3`.
// Written by `hopline generate typescript` from its schema: generate it anew instead of changing it.

export type Empty = unknown;

export type Error2 = "Self" | "self" | "\"\n" | { "None": Error2None };

export type Error2None = {
  "x": Error2;
};

export type ImportOs = {
  "\"}\n\u202e${x}\\": string;
  "Type"?: number;
  "inline"?: ImportOsInline;
  "self": String2;
  "type": number | null;
};

export type ImportOsInline = {
  "deep"?: [boolean];
};

export type Pair = [String2, ResultClient];

export type ResultClient = unknown;

export type Round = unknown;

export type Round2 = (Round)[];

export type String2 = {
  "next": String2 | null;
  "pair"?: Pair;
};

export type Tagged = unknown;

export type Transport2 = {
};

/** Makes the calls, by docs/wire.md of Hopline. It rejects with the errors, the method's own ones among them. */
export interface Transport {
  call(service: string, method: string, args: unknown[]): Promise<unknown>;
  oneway(service: string, method: string, args: unknown[]): Promise<void>;
}

export class ResultServiceClient {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  async new2(self: string, t: String2, x_i64_fn_evil: ImportOs, value: unknown): Promise<Round> {
    return (await this.#transport.call("Result.v3", "new", [self, t, x_i64_fn_evil, value])) as Round;
  }

  async init(): Promise<void> {
    await this.#transport.oneway("Result.v3", "__init__", []);
  }

  async constructor2(class2: boolean): Promise<unknown> {
    return (await this.#transport.call("Result.v3", "constructor", [class2])) as unknown;
  }

  async a_b(): Promise<void> {
    await this.#transport.call("Result.v3", "a-b", []);
  }

  async a_b2(): Promise<void> {
    await this.#transport.call("Result.v3", "a_b", []);
  }

  async type2(): Promise<string | null> {
    return (await this.#transport.call("Result.v3", "type", [])) as string | null;
  }

  // `many` is left out: it has more than 16 parameters.

  // `opaque` is left out: its types have no schema.
}
