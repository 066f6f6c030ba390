/** A call that failed: `code` is the name of its result, such as HALITE_ARGUMENT. */
export class HaliteError extends Error {
  readonly code: string;
}

/** Loads the library from the bytes of halite.wasm, a `Response`, or a promise of one. */
export function load(wasm: BufferSource | Response | Promise<BufferSource | Response>): Promise<Library>;

/** The bytes of a file on a server, by range requests where it takes them. */
export function download(
  url: string,
  options?: { partBytes?: number; tries?: number },
): Promise<{ byteCount: number; chunks: AsyncIterable<Uint8Array> }>;

/** The parts of a stream. */
export function parts(stream: ReadableStream<Uint8Array>): AsyncIterable<Uint8Array>;

export interface Library {
  readonly version: string;
  /** Bytes of the module's memory, which never shrinks. */
  readonly memoryBytes: number;
  /** Opens a GGUF file of so many bytes, which come in order. */
  openModel(
    byteCount: number,
    chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>,
    options?: { name?: string; progress?: (bytes: number) => void },
  ): Promise<Model>;
}

export interface Model {
  /** `HaliteModelInfo` of halite.h, with the model's name and architecture. */
  info(): { name: string; architecture: string; context_length: number; vocab_size: number; file_bytes: number } & Record<
    string,
    number | string
  >;
  encode(text: string): Uint32Array;
  /** The tokens of a chat's prompt, by the template in the model file. */
  chatPrompt(messages: { role: string; content: string }[]): Uint32Array;
  /** Reserves all memory of a sequence, on the CPU if nothing else is asked for. */
  session(options?: { backend?: 'cpu' | 'gpu'; context?: number; batch?: number; kv_format?: string }): Promise<Session>;
  close(): void;
}

/** `HaliteGenerateOptions` of halite.h. */
export interface GenerateOptions {
  max_tokens?: number;
  temperature?: number;
  top_k?: number;
  top_p?: number;
  min_p?: number;
  repeat_penalty?: number;
  frequency_penalty?: number;
  presence_penalty?: number;
  penalty_window?: number;
  seed?: number | bigint;
  stop?: string[];
  ignore_end?: 0 | 1;
  show_special?: 0 | 1;
}

/** `HaliteGenerationInfo` of halite.h. */
export interface GenerationInfo {
  finish: number;
  prompt_tokens: number;
  reused_tokens: number;
  tokens: number;
  decode_steps: number;
  prefill_seconds: number;
  first_token_seconds: number;
  decode_seconds: number;
}

export interface Session {
  readonly backend: string;
  /** The backend's device, for people. */
  readonly device: string;
  info(): { context: number; batch: number; outputs: number; vocab_size: number; top_k: number };
  /** Makes the sequence empty. */
  clear(): void;
  /** The tokens of the sequence. */
  tokens(): Uint32Array;
  /** Appends tokens, and returns the logits after the last one. */
  logits(tokens: ArrayLike<number>): Promise<Float32Array>;
  /** Continues a text or tokens, piece by piece. Leave the loop to stop. */
  stream(
    prompt: string | Uint32Array,
    options?: GenerateOptions & { signal?: AbortSignal; progress?: (tokens: number, of: number) => void },
  ): AsyncGenerator<string>;
  /** What the last generation did. */
  readonly lastGeneration?: GenerationInfo;
  close(): void;
}
