/* The C interface of Halite, which runs language models inside a program. docs/c-api.md explains it from the start.
 *
 * Results: every function that returns a HaliteResult returns HALITE_OK or says what is wrong, and halite_last_error has the
 * message. A call that fails changes nothing but what its description says. The library neither prints, nor aborts, nor
 * throws; halite_set_log receives what it has to say.
 *
 * Handles: a handle is not the address of anything. A null, closed or wrong handle is HALITE_HANDLE. A failed open leaves
 * null. Handles may be closed in any order: what was made from a closed one keeps what it needs.
 *
 * Threads: every function may be called from any thread. Where a function says "one at a time", a second call at the same
 * time returns HALITE_BUSY at once.
 *
 * Text: texts in are UTF-8 and end with a zero, unless a function takes their bytes. Texts out go to a buffer of the
 * caller, with a zero at the end, and so do arrays. `capacity` counts the elements of the buffer, `length` receives the
 * number of elements without the zero, and may be null. If the buffer is null and its capacity is 0, only the length is
 * written. If the capacity does not suffice, the result is HALITE_TOO_SMALL, and again only the length is written.
 *
 * Structs: each begins with `struct_bytes`, which the caller sets to sizeof of it; the rest may be 0. A field of 0 has its
 * default. A struct of an older version, which is shorter, is taken as if it went on with zeros. One of a later version is
 * taken if what this version does not know is 0, and is HALITE_ARGUMENT otherwise. In arrays of structs all have the same
 * size.
 *
 * Pointers that are not null must point to what the function describes, for the length of the call.
 *
 * This header and halite_backend.h can be included together.
 *
 * Generated from capi/src. Do not edit. */

#ifndef HALITE_H
#define HALITE_H

#include <stddef.h>
#include <stdint.h>

// In place of the bytes of a text that ends with a zero.
#define HALITE_ZERO_TERMINATED SIZE_MAX

// In place of a token: there is none.
#define HALITE_NO_TOKEN UINT32_MAX



// A chat template and the messages so far.
typedef struct HaliteChat HaliteChat;

// Turns a stream of tokens into text, in whole characters.
typedef struct HaliteDecoder HaliteDecoder;

// An encoder on a backend. Opening it reserves all memory of the device.
typedef struct HaliteEmbedder HaliteEmbedder;

// A generation under way, whose text the caller pulls.
typedef struct HaliteGeneration HaliteGeneration;

// A rule that a generation's text follows. Any number of generations may use it, also at once.
typedef struct HaliteGrammar HaliteGrammar;

// A model file. Opening it reads the header alone; weights are mapped.
typedef struct HaliteModel HaliteModel;

// An open backend: a device that runs models.
typedef struct HaliteOpenBackend HaliteOpenBackend;

// A model on a backend, with its sequences and their KV cache. Opening it reserves all its memory.
typedef struct HaliteSession HaliteSession;

// The vocabulary of a model, and its algorithm.
typedef struct HaliteTokenizer HaliteTokenizer;

// What a call returns. Numbers that this header does not name may come with later versions.
typedef uint32_t HaliteResult;

// How much a message matters: the higher, the less.
typedef uint32_t HaliteLogLevel;

// Receives messages, in UTF-8, valid during the call. It may be called from any thread, and must not call
// this library.
typedef void (*HaliteLog)(HaliteLogLevel level, const char *message, void *user);

// The sizes of a model.
typedef struct HaliteModelInfo {
  uint32_t struct_bytes;
  // Positions that the model was made for.
  uint32_t context_length;
  uint32_t embedding_length;
  uint32_t block_count;
  uint32_t vocab_size;
  // 0 in a model without experts.
  uint32_t expert_count;
  uint32_t expert_used_count;
  uint32_t tensor_count;
  // Adapters that were added.
  uint32_t adapter_count;
  uint32_t reserved;
  // Bytes of its files, with those of adapters.
  uint64_t file_bytes;
} HaliteModelInfo;

// Facts about a tokenizer.
typedef struct HaliteTokenizerInfo {
  uint32_t struct_bytes;
  uint32_t token_count;
  // The token that begins a text, or HALITE_NO_TOKEN.
  uint32_t bos;
  // The token that ends a text, or HALITE_NO_TOKEN.
  uint32_t eos;
  // Whether encoding begins with `bos`: 0 or 1.
  uint32_t adds_bos;
  // Whether encoding puts a space before a text, which decoding leaves there: 0 or 1.
  uint32_t adds_space_prefix;
} HaliteTokenizerInfo;

// Options of encoding and decoding, which add up.
typedef uint32_t HaliteTextFlags;

// The type of a token: the numbers of GGUF's tokenizer.ggml.token_type.
typedef uint32_t HaliteTokenKind;

// What a backend promises about its results.
typedef uint32_t HalitePromise;

// Facts about a backend.
typedef struct HaliteBackendInfo {
  uint32_t struct_bytes;
  HalitePromise promise;
  // Bytes of memory for weights and caches; UINT64_MAX: no limit.
  uint64_t memory_bytes;
} HaliteBackendInfo;

// Returns `bytes` bytes at a multiple of `alignment`, which is a power of two, or null. They need not be
// zero.
typedef void *(*HaliteAllocate)(size_t bytes, size_t alignment, void *user);

// Takes back what HaliteAllocate returned, with the same size.
typedef void (*HaliteFree)(void *memory, size_t bytes, void *user);

// An allocator of the caller. Its functions may be called from any thread until the backend and all its
// sessions are closed. They must not call this library.
typedef struct HaliteMemory {
  uint32_t struct_bytes;
  uint32_t reserved;
  HaliteAllocate allocate;
  HaliteFree free;
  void *user;
} HaliteMemory;

// The sizes of a session. A field that is 0 has its default.
typedef struct HaliteSessionOptions {
  uint32_t struct_bytes;
  // Positions of the KV cache, which all sequences share. Default: the model's, at most 4096.
  uint32_t context;
  // Most tokens of a step. Default: 512.
  uint32_t batch;
  // Most outputs of a step. Default: 1.
  uint32_t outputs;
  // Sequences for which sliding-window layers reserve memory. Default: 1.
  uint32_t sequences;
  // Positions that halite_session_truncate can always undo in sliding-window layers. Default: 64.
  uint32_t rewind;
  // Maximum bytes of the whole process. Weights that do not fit are read from the file in each step, and steps
  // may get smaller. Default: no limit, weights are mapped.
  uint64_t memory_bytes;
  // Format of the KV cache, such as "q8_0". Default: "f16".
  const char *kv_format;
  // A folder on a drive for a KV cache that takes much of memory_bytes. Default: such a cache is an error.
  const char *spill_folder;
} HaliteSessionOptions;

// The memory that a session needs.
typedef struct HaliteMemoryPlan {
  uint32_t struct_bytes;
  // Positions of the KV cache.
  uint32_t context;
  // Weights. A backend in host memory uses the mapped file.
  uint64_t weight_bytes;
  uint64_t kv_bytes;
  // Intermediate results.
  uint64_t scratch_bytes;
  // Inputs and outputs of steps.
  uint64_t io_bytes;
  // Weights that stay in the file, within memory_bytes of the options: a step reads those that it needs.
  uint64_t streamed_bytes;
  // Memory for what is read of them ahead.
  uint64_t stream_bytes;
  // The part of the KV cache that is kept in a file.
  uint64_t spilled_bytes;
} HaliteMemoryPlan;

// The sizes of an open session.
typedef struct HaliteSessionInfo {
  uint32_t struct_bytes;
  uint32_t context;
  uint32_t batch;
  uint32_t outputs;
  // Elements of a row of logits.
  uint32_t vocab_size;
  // Tokens of each output of HALITE_OUTPUT_TOP_K.
  uint32_t top_k;
} HaliteSessionInfo;

// A sequence of a session: the number that halite_session_add wrote. No number is used twice.
typedef uint64_t HaliteSequence;

// Which tokens of a run have outputs.
typedef uint32_t HaliteOutputTokens;

// Tokens that continue a sequence in a step.
typedef struct HaliteRun {
  uint32_t struct_bytes;
  HaliteOutputTokens outputs;
  HaliteSequence sequence;
  const uint32_t *tokens;
  size_t token_count;
} HaliteRun;

// What a step computes for its outputs.
typedef uint32_t HaliteOutputKind;

// The language of a rule.
typedef uint32_t HaliteGrammarKind;

// Options of a generation. A field that is 0 has its default, which is greedy.
typedef struct HaliteGenerateOptions {
  uint32_t struct_bytes;
  // Most tokens to generate. Default: 128.
  uint32_t max_tokens;
  // Divides the logits. Default: 0, which takes the most likely token.
  float temperature;
  // Keeps so many of the most likely tokens. Default: 40; below 0: all.
  int32_t top_k;
  // Keeps the most likely tokens whose probabilities add up to this. Default: 0.95; 1: all.
  float top_p;
  // Drops tokens less likely than this times the most likely one. Default: 0.05; below 0: none.
  float min_p;
  // Divides positive and multiplies negative logits of recent tokens. Default: 1, which is off.
  float repeat_penalty;
  // Subtracted for each time that a token is recent. Default: 0.
  float frequency_penalty;
  // Subtracted if a token is recent. Default: 0.
  float presence_penalty;
  // Tokens that are recent. Default: 64.
  uint32_t penalty_window;
  // Seed of the random draws.
  uint64_t seed;
  // Texts that end the generation, which leaves them out.
  const char *const *stop;
  // Holds the text to a grammar. Default: none.
  const struct HaliteGrammar *grammar;
  uint32_t stop_count;
  // Go on after end-of-text tokens: 0 or 1.
  uint32_t ignore_end;
  // Show control tokens in the text: 0 or 1.
  uint32_t show_special;
  // Milliseconds after which the generation ends, within one op. Default: none.
  uint32_t deadline_ms;
  // Drafts up to so many tokens by looking them up in the text, which a step verifies; the session must
  // have more outputs than that. Default: none.
  uint32_t lookup;
  uint32_t reserved;
} HaliteGenerateOptions;

// Receives text as it appears, in whole characters: UTF-8 with a zero at the end, valid during the call.
// Returns 0 to go on, and any other number to stop. The session is in use meanwhile, so calls with it return
// HALITE_BUSY, except for halite_session_cancel and halite_session_reset. It must return, neither by an
// exception nor by longjmp.
typedef int (*HaliteOnText)(const char *text, size_t bytes, void *user);

// Why a generation ended.
typedef uint32_t HaliteFinish;

// What a generation did.
typedef struct HaliteGenerationInfo {
  uint32_t struct_bytes;
  HaliteFinish finish;
  uint32_t prompt_tokens;
  // Tokens of the prompt that the sequence had already.
  uint32_t reused_tokens;
  // Generated tokens.
  uint32_t tokens;
  // Steps after the prompt.
  uint32_t decode_steps;
  uint32_t drafted_tokens;
  // Drafted tokens that were right.
  uint32_t accepted_tokens;
  double prefill_seconds;
  double first_token_seconds;
  double decode_seconds;
} HaliteGenerationInfo;

// How the vectors of tokens become one.
typedef uint32_t HalitePooling;

// Options of an embedder. A field that is 0 has its default.
typedef struct HaliteEmbedOptions {
  uint32_t struct_bytes;
  // Most tokens of a step, and so of a text. Default: 512.
  uint32_t batch;
  HalitePooling pooling;
  // Leave vectors as they are, rather than scale them to length 1: 0 or 1.
  uint32_t no_normalize;
  // Truncate texts that are too long, which are errors otherwise: 0 or 1.
  uint32_t truncate;
  uint32_t reserved;
} HaliteEmbedOptions;

// The sizes of an embedder.
typedef struct HaliteEmbedderInfo {
  uint32_t struct_bytes;
  // Elements of a vector.
  uint32_t dimension;
  uint32_t max_text_tokens;
  uint32_t reserved;
} HaliteEmbedderInfo;

#define HALITE_OK 0

// Something else failed; the message says what.
#define HALITE_ERROR 1

#define HALITE_OUT_OF_MEMORY 2

// An argument is wrong: a null pointer, a number out of range, a struct_bytes that no version has.
#define HALITE_ARGUMENT 3

// Another thread cancelled the work.
#define HALITE_CANCELLED 4

// The library has an error in its code, and caught it. Close the handles of the call.
#define HALITE_INTERNAL 16

// A handle is null, closed, or of another kind.
#define HALITE_HANDLE 17

// Another call uses the handle.
#define HALITE_BUSY 18

// The buffer is too small. The needed length was written, and nothing else.
#define HALITE_TOO_SMALL 19

// This build of the library lacks the feature.
#define HALITE_NOT_BUILT 20

// A file cannot be read or written.
#define HALITE_IO 21

// A file, a template, a grammar or saved bytes are malformed, or do not fit the model.
#define HALITE_MALFORMED 22

// The model, or an op of it on this backend, is not supported.
#define HALITE_UNSUPPORTED 23

// The sequences do not fit in the session's memory.
#define HALITE_CONTEXT_FULL 24

// The deadline passed.
#define HALITE_DEADLINE 25

// A text is not UTF-8.
#define HALITE_UTF8 26

// What was asked for is not there.
#define HALITE_NOT_FOUND 27

// The model computed NaN or infinity.
#define HALITE_NOT_FINITE 28

// The generation is complete: no more text comes.
#define HALITE_END 29

// An error in the library's code, which its call also reports.
#define HALITE_LOG_ERROR 1

// Something in a model file that may surprise.
#define HALITE_LOG_WARNING 2

// What happened, such as progress of loading.
#define HALITE_LOG_INFO 3

// Of encoding: leave out the begin- and end-of-text tokens.
#define HALITE_NO_SPECIAL 1

// Of encoding: read control tokens in the text, except in text from halite_tokenizer_quote. Not for
// untrusted text.
#define HALITE_PARSE_SPECIAL 2

// Of decoding: show control tokens.
#define HALITE_SHOW_SPECIAL 4

#define HALITE_TOKEN_NORMAL 1

#define HALITE_TOKEN_UNKNOWN 2

#define HALITE_TOKEN_CONTROL 3

#define HALITE_TOKEN_USER_DEFINED 4

#define HALITE_TOKEN_UNUSED 5

#define HALITE_TOKEN_BYTE 6

// The same bits as the reference.
#define HALITE_PROMISE_EXACT 0

// Close to the reference.
#define HALITE_PROMISE_CLOSE 1

// Computed in the device's own number formats.
#define HALITE_PROMISE_NATIVE 2

// Rows of logits; see halite_session_logits.
#define HALITE_OUTPUT_LOGITS 0

// The most likely tokens; see halite_session_arg_max.
#define HALITE_OUTPUT_ARG_MAX 1

// The most likely tokens and their logits; see halite_session_top_k.
#define HALITE_OUTPUT_TOP_K 2

#define HALITE_OUTPUT_LAST 0

#define HALITE_OUTPUT_NONE 1

#define HALITE_OUTPUT_ALL 2

// A JSON schema; the text is JSON without white space.
#define HALITE_GRAMMAR_JSON_SCHEMA 0

// A regular expression, which matches the whole text.
#define HALITE_GRAMMAR_REGEX 1

// A grammar in GBNF.
#define HALITE_GRAMMAR_GBNF 2

// A grammar in llguidance's variant of Lark.
#define HALITE_GRAMMAR_LARK 3

// It goes on.
#define HALITE_FINISH_NONE 0

// The model ended the text.
#define HALITE_FINISH_END 1

// max_tokens were generated.
#define HALITE_FINISH_LENGTH 2

// A stop text appeared.
#define HALITE_FINISH_STOP 3

// The session's memory is full.
#define HALITE_FINISH_CONTEXT_FULL 4

// The callback said so.
#define HALITE_FINISH_CALLBACK 5

// Another thread said so.
#define HALITE_FINISH_CANCELLED 6

// The deadline passed.
#define HALITE_FINISH_DEADLINE 7

// A step failed; its call returned why.
#define HALITE_FINISH_ERROR 8

// As the model says.
#define HALITE_POOLING_DEFAULT 0

// The mean of all tokens.
#define HALITE_POOLING_MEAN 1

// The first token.
#define HALITE_POOLING_FIRST 2

// The last token.
#define HALITE_POOLING_LAST 3

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Returns the version of the library, as in "0.1.0". Threads: any.
const char *halite_version(void);

// Returns the message of the last call on this thread that failed, in UTF-8, never null. It stays valid
// until the next call on this thread that fails, or until the thread ends. Calls that return HALITE_OK leave
// it as it is. Threads: any; each has its own message.
const char *halite_last_error(void);

// Returns the name of a result, as in "HALITE_BUSY", never null. Threads: any.
const char *halite_result_name(HaliteResult result);

// Sets the receiver of messages up to a level; null for none, as at the start. It replaces the one before,
// which is not called any more once this returns. Threads: any.
HaliteResult halite_set_log(HaliteLog log, HaliteLogLevel level, void *user);

// Opens a GGUF file, the first one of a split model. The path is bytes on Unix and UTF-8 elsewhere. Threads:
// any.
HaliteResult halite_model_open(const char *path, struct HaliteModel **model);

// Opens a GGUF file without a map, as halite_model_open. Sessions read weights from the file: into memory, or in
// each step if they do not fit the memory_bytes of their options. Threads: any.
HaliteResult halite_model_open_unmapped(const char *path, struct HaliteModel **model);

// Opens a GGUF file in memory, which is copied. The name appears in messages. Threads: any.
HaliteResult halite_model_open_memory(const char *name,
                                      const void *bytes,
                                      size_t byte_count,
                                      struct HaliteModel **model);

// Opens the built-in model, a small one that continues English prose. Threads: any.
HaliteResult halite_model_open_builtin(struct HaliteModel **model);

// Closes a model. What was made from it keeps what it needs. Threads: any.
HaliteResult halite_model_close(struct HaliteModel *model);

// Adds a low-rank adapter (LoRA), a GGUF file, with a scale; several add up. Sessions, embedders and
// generations that are open keep the model from changing: add adapters first, else the result is
// HALITE_BUSY. Threads: any.
HaliteResult halite_model_add_adapter(struct HaliteModel *model, const char *path, float scale);

// Writes the sizes of a model. Threads: any.
HaliteResult halite_model_info(const struct HaliteModel *model, struct HaliteModelInfo *info);

// Writes the name of a model. Threads: any.
HaliteResult halite_model_name(const struct HaliteModel *model, char *out, size_t capacity, size_t *length);

// Writes the architecture of a model, such as "llama". Threads: any.
HaliteResult halite_model_architecture(const struct HaliteModel *model, char *out, size_t capacity, size_t *length);

// Writes the number of metadata keys of the file. Threads: any.
HaliteResult halite_model_metadata_count(const struct HaliteModel *model, size_t *count);

// Writes the name of a metadata key, below halite_model_metadata_count. Threads: any.
HaliteResult halite_model_metadata_key(const struct HaliteModel *model,
                                       size_t index,
                                       char *out,
                                       size_t capacity,
                                       size_t *length);

// Writes the value of a metadata key for people: any type; long texts and arrays are cut. Threads: any.
HaliteResult halite_model_metadata_describe(const struct HaliteModel *model,
                                            const char *key,
                                            char *out,
                                            size_t capacity,
                                            size_t *length);

// Writes the value of a metadata key that is a text. Threads: any.
HaliteResult halite_model_metadata_text(const struct HaliteModel *model,
                                        const char *key,
                                        char *out,
                                        size_t capacity,
                                        size_t *length);

// Writes the value of a metadata key that is an integer and not negative. Threads: any.
HaliteResult halite_model_metadata_integer(const struct HaliteModel *model, const char *key, uint64_t *value);

// Writes the value of a metadata key that is a 32-bit floating-point number. Threads: any.
HaliteResult halite_model_metadata_float(const struct HaliteModel *model, const char *key, float *value);

// Reads the tokenizer of a model file; HALITE_NOT_FOUND if it has none. Threads: any.
HaliteResult halite_tokenizer_open(const struct HaliteModel *model, struct HaliteTokenizer **tokenizer);

// Closes a tokenizer. What was made from it keeps what it needs. Threads: any.
HaliteResult halite_tokenizer_close(struct HaliteTokenizer *tokenizer);

// Writes facts about a tokenizer. Threads: any.
HaliteResult halite_tokenizer_info(const struct HaliteTokenizer *tokenizer, struct HaliteTokenizerInfo *info);

// Encodes `text_bytes` bytes of text, or HALITE_ZERO_TERMINATED. Flags: HALITE_NO_SPECIAL,
// HALITE_PARSE_SPECIAL. Threads: any.
HaliteResult halite_tokenizer_encode(const struct HaliteTokenizer *tokenizer,
                                     const char *text,
                                     size_t text_bytes,
                                     HaliteTextFlags flags,
                                     uint32_t *out,
                                     size_t capacity,
                                     size_t *length);

// Decodes tokens. Bytes that are not UTF-8 become replacement characters. Flags: HALITE_SHOW_SPECIAL.
// Threads: any.
HaliteResult halite_tokenizer_decode(const struct HaliteTokenizer *tokenizer,
                                     const uint32_t *tokens,
                                     size_t token_count,
                                     HaliteTextFlags flags,
                                     char *out,
                                     size_t capacity,
                                     size_t *length);

// Writes the bytes of a token in the vocabulary, which need not be UTF-8 and do not end with a zero.
// Threads: any.
HaliteResult halite_tokenizer_piece(const struct HaliteTokenizer *tokenizer,
                                    uint32_t token,
                                    uint8_t *out,
                                    size_t capacity,
                                    size_t *length);

// Finds the token of `piece_bytes` bytes in the vocabulary; HALITE_NOT_FOUND if there is none. Threads: any.
HaliteResult halite_tokenizer_find(const struct HaliteTokenizer *tokenizer,
                                   const uint8_t *piece,
                                   size_t piece_bytes,
                                   uint32_t *token);

// Writes the type of a token, and whether it ends a generation (0 or 1); either may be null. Threads: any.
HaliteResult halite_tokenizer_kind(const struct HaliteTokenizer *tokenizer,
                                   uint32_t token,
                                   HaliteTokenKind *kind,
                                   uint32_t *is_end);

// Quotes untrusted text, so that control tokens in it encode as plain text under HALITE_PARSE_SPECIAL and in
// chats. Threads: any.
HaliteResult halite_tokenizer_quote(const struct HaliteTokenizer *tokenizer,
                                    const char *text,
                                    size_t text_bytes,
                                    char *out,
                                    size_t capacity,
                                    size_t *length);

// Opens a decoder of a stream of tokens. Flags: HALITE_SHOW_SPECIAL. Threads: any.
HaliteResult halite_decoder_open(const struct HaliteTokenizer *tokenizer,
                                 HaliteTextFlags flags,
                                 struct HaliteDecoder **decoder);

// Adds a token to a decoder. Threads: one at a time per decoder.
HaliteResult halite_decoder_push(struct HaliteDecoder *decoder, uint32_t token);

// Ends the stream: a character that is incomplete becomes a replacement character. Threads: one at a time
// per decoder.
HaliteResult halite_decoder_finish(struct HaliteDecoder *decoder);

// Takes the text that is complete so far, which may be empty. It stays if it is not written. Threads: one at
// a time per decoder.
HaliteResult halite_decoder_take(struct HaliteDecoder *decoder, char *out, size_t capacity, size_t *length);

// Closes a decoder. Threads: any.
HaliteResult halite_decoder_close(struct HaliteDecoder *decoder);

// Writes the number of backends of this build. Threads: any.
HaliteResult halite_backend_count(size_t *count);

// Writes how the name of a backend is spelled, as in `cpu` and `plugin:FILE[:OPTIONS]`; `index` is below
// halite_backend_count. Threads: any.
HaliteResult halite_backend_spelling(size_t index, char *out, size_t capacity, size_t *length);

// Opens a backend by its name: "cpu", "reference", "gpu:1", "plugin:FILE", and so on. Options are separated
// by commas, as in "threads=2", or null. They may follow the name of a backend that has no argument:
// "cpu:threads=2". Several sessions may use one backend. Threads: any.
HaliteResult halite_backend_open(const char *name, const char *options, struct HaliteOpenBackend **backend);

// Makes one backend of two: what the first one lacks runs on the second one. Both may be closed after it.
// For bringing up a new device. Threads: any.
HaliteResult halite_backend_join(const struct HaliteOpenBackend *first,
                                 const struct HaliteOpenBackend *second,
                                 struct HaliteOpenBackend **backend);

// Closes a backend. Sessions that use it keep it. Threads: any.
HaliteResult halite_backend_close(struct HaliteOpenBackend *backend);

// Writes facts about a backend. Threads: any.
HaliteResult halite_backend_info(const struct HaliteOpenBackend *backend, struct HaliteBackendInfo *info);

// Writes the description of a backend's device, for people. Threads: any.
HaliteResult halite_backend_device(const struct HaliteOpenBackend *backend, char *out, size_t capacity, size_t *length);

// Opens the backend "cpu" on so many threads, 0 for one per core, with an allocator for all memory that
// grows with a model or a session: KV cache, inputs, outputs, scratch, and weights that are not mapped.
// Threads: any.
HaliteResult halite_backend_open_cpu(uint32_t threads,
                                     const struct HaliteMemory *memory,
                                     struct HaliteOpenBackend **backend);

// Writes the memory that a session would need, and reads no weights. The options may be null. Threads: any.
HaliteResult halite_session_plan(const struct HaliteModel *model,
                                 const struct HaliteOpenBackend *backend,
                                 const struct HaliteSessionOptions *options,
                                 struct HaliteMemoryPlan *plan);

// Opens a session: loads the weights and reserves all memory. The options may be null. Threads: any.
HaliteResult halite_session_open(const struct HaliteModel *model,
                                 const struct HaliteOpenBackend *backend,
                                 const struct HaliteSessionOptions *options,
                                 struct HaliteSession **session);

// Closes a session. Its memory is freed once no call and no generation uses it. Threads: any.
HaliteResult halite_session_close(struct HaliteSession *session);

// Writes the sizes of a session. Threads: one at a time per session.
HaliteResult halite_session_info(const struct HaliteSession *session, struct HaliteSessionInfo *info);

// Stops the session's work within one op: steps return HALITE_CANCELLED, generations end. It holds for later
// work, too, until halite_session_reset. Threads: any, also while another call uses the session.
HaliteResult halite_session_cancel(const struct HaliteSession *session);

// Takes back halite_session_cancel. Threads: any, also while another call uses the session.
HaliteResult halite_session_reset(const struct HaliteSession *session);

// Adds an empty sequence. Threads: one at a time per session.
HaliteResult halite_session_add(struct HaliteSession *session, HaliteSequence *sequence);

// Copies a sequence. The two share memory until one of them goes on. Threads: one at a time per session.
HaliteResult halite_session_fork(struct HaliteSession *session, HaliteSequence from, HaliteSequence *sequence);

// Truncates a sequence to `length` tokens; a longer length changes nothing. Threads: one at a time per
// session.
HaliteResult halite_session_truncate(struct HaliteSession *session, HaliteSequence sequence, uint32_t length);

// Removes a sequence, and frees its memory for others. Threads: one at a time per session.
HaliteResult halite_session_remove(struct HaliteSession *session, HaliteSequence sequence);

// Writes the tokens of a sequence. Threads: one at a time per session.
HaliteResult halite_session_tokens(const struct HaliteSession *session,
                                   HaliteSequence sequence,
                                   uint32_t *out,
                                   size_t capacity,
                                   size_t *length);

// Runs a step: each run continues its sequence, at most one per sequence, and one step may mix prompts with
// single tokens. On an error no sequence changes. After `deadline_ms` milliseconds the step stops within one
// op with HALITE_DEADLINE; 0: no deadline. Threads: one at a time per session.
HaliteResult halite_session_step(struct HaliteSession *session,
                                 const struct HaliteRun *runs,
                                 size_t run_count,
                                 HaliteOutputKind kind,
                                 uint32_t deadline_ms);

// Continues a sequence with tokens, in as many steps as they need, and computes the output of the last
// token. Steps before one that fails stay in the sequence. The deadline is that of all steps, as in
// halite_session_step. Threads: one at a time per session.
HaliteResult halite_session_prefill(struct HaliteSession *session,
                                    HaliteSequence sequence,
                                    const uint32_t *tokens,
                                    size_t token_count,
                                    HaliteOutputKind kind,
                                    uint32_t deadline_ms);

// Writes the logits of the last step's outputs, row by row, in the order of its tokens. Threads: one at a
// time per session.
HaliteResult halite_session_logits(const struct HaliteSession *session, float *out, size_t capacity, size_t *length);

// Writes the most likely token of each of the last step's outputs. Threads: one at a time per session.
HaliteResult halite_session_arg_max(const struct HaliteSession *session,
                                    uint32_t *out,
                                    size_t capacity,
                                    size_t *length);

// Writes the most likely tokens of each of the last step's outputs, most likely first, and their logits: for
// each output HaliteSessionInfo::top_k of them. `capacity` is that of each buffer. Threads: one at a time
// per session.
HaliteResult halite_session_top_k(const struct HaliteSession *session,
                                  uint32_t *tokens,
                                  float *logits,
                                  size_t capacity,
                                  size_t *length);

// Compiles a grammar for a tokenizer. Threads: any.
HaliteResult halite_grammar_open(const struct HaliteTokenizer *tokenizer,
                                 HaliteGrammarKind kind,
                                 const char *text,
                                 struct HaliteGrammar **grammar);

// Closes a grammar. Generations that use it keep it. Threads: any.
HaliteResult halite_grammar_close(struct HaliteGrammar *grammar);

// Generates text after a prompt in a sequence, and passes it to a callback, which may be null. The common
// prefix of the sequence and the prompt is kept, the rest of the sequence is dropped. A generation that was
// cancelled, or ended by its deadline, is no error: HaliteGenerationInfo::finish says so. The options and
// the info may be null. Threads: one at a time per session.
HaliteResult halite_generate(struct HaliteSession *session,
                             HaliteSequence sequence,
                             const struct HaliteTokenizer *tokenizer,
                             const uint32_t *prompt,
                             size_t prompt_count,
                             const struct HaliteGenerateOptions *options,
                             HaliteOnText on_text,
                             void *user,
                             struct HaliteGenerationInfo *info);

// Starts a generation as halite_generate does, whose text the caller pulls with halite_generation_next. It
// runs no step yet. Leave its sequence alone until it is closed; other sequences of the session may run
// between its steps. Threads: one at a time per session.
HaliteResult halite_generation_open(struct HaliteSession *session,
                                    HaliteSequence sequence,
                                    const struct HaliteTokenizer *tokenizer,
                                    const uint32_t *prompt,
                                    size_t prompt_count,
                                    const struct HaliteGenerateOptions *options,
                                    struct HaliteGeneration **generation);

// Runs steps until there is text, and takes it: whole characters, in UTF-8. Text that is not written,
// because there is no buffer or it is too small, stays for the next call. HALITE_END if the generation is
// complete; a text of length 0 never comes. Threads: one at a time per session.
HaliteResult halite_generation_next(struct HaliteGeneration *generation, char *out, size_t capacity, size_t *length);

// Writes what a generation did so far. Threads: one at a time per generation.
HaliteResult halite_generation_info(const struct HaliteGeneration *generation, struct HaliteGenerationInfo *info);

// Writes the tokens that a generation generated so far. Threads: one at a time per generation.
HaliteResult halite_generation_tokens(const struct HaliteGeneration *generation,
                                      uint32_t *out,
                                      size_t capacity,
                                      size_t *length);

// Closes a generation. Its sequence stays, with the text so far. Threads: any.
HaliteResult halite_generation_close(struct HaliteGeneration *generation);

// Opens a chat with a template in Jinja, or null for the one in the model file; HALITE_NOT_FOUND if it has
// none. Threads: any.
HaliteResult halite_chat_open(const struct HaliteModel *model,
                              const struct HaliteTokenizer *tokenizer,
                              const char *chat_template,
                              struct HaliteChat **chat);

// Adds a message: its role, such as "system" or "user", and its text. Unless `is_trusted` is set (not 0),
// control tokens in the text are plain text. Threads: one at a time per chat.
HaliteResult halite_chat_add(struct HaliteChat *chat, const char *role, const char *text, uint32_t is_trusted);

// Adds the assistant's answer: generated text, of which only the last channel counts in the harmony format.
// Generate with HaliteGenerateOptions::show_special. Threads: one at a time per chat.
HaliteResult halite_chat_add_answer(struct HaliteChat *chat, const char *generated);

// Keeps the first `count` messages; 0 starts anew. Threads: one at a time per chat.
HaliteResult halite_chat_truncate(struct HaliteChat *chat, size_t count);

// Writes the number of messages. Threads: one at a time per chat.
HaliteResult halite_chat_count(const struct HaliteChat *chat, size_t *count);

// Writes the tokens of the prompt: all messages, up to the start of the answer. Threads: one at a time per
// chat.
HaliteResult halite_chat_prompt(const struct HaliteChat *chat, uint32_t *out, size_t capacity, size_t *length);

// Closes a chat. Threads: any.
HaliteResult halite_chat_close(struct HaliteChat *chat);

// Opens an embedder: loads the weights and reserves memory. The options may be null. HALITE_MALFORMED for a
// model that is no encoder. Threads: any.
HaliteResult halite_embedder_open(const struct HaliteModel *model,
                                  const struct HaliteOpenBackend *backend,
                                  const struct HaliteEmbedOptions *options,
                                  struct HaliteEmbedder **embedder);

// Closes an embedder. Threads: any.
HaliteResult halite_embedder_close(struct HaliteEmbedder *embedder);

// Writes the sizes of an embedder. Threads: one at a time per embedder.
HaliteResult halite_embedder_info(const struct HaliteEmbedder *embedder, struct HaliteEmbedderInfo *info);

// Writes a vector for each text, one after the other: `text_count` times HaliteEmbedderInfo::dimension. A
// vector does not depend on the other texts. Without a buffer, nothing is computed. Threads: one at a time
// per embedder.
HaliteResult halite_embedder_embed(struct HaliteEmbedder *embedder,
                                   const struct HaliteTokenizer *tokenizer,
                                   const char *const *texts,
                                   size_t text_count,
                                   uint32_t deadline_ms,
                                   float *out,
                                   size_t capacity,
                                   size_t *length);

// Writes the score of each document for a query, in order: higher is better. HALITE_MALFORMED for a model that is no reranker. Without a
// buffer, nothing is computed. Threads: one at a time per embedder.
HaliteResult halite_embedder_rank(struct HaliteEmbedder *embedder,
                                  const struct HaliteTokenizer *tokenizer,
                                  const char *query,
                                  const char *const *documents,
                                  size_t document_count,
                                  uint32_t deadline_ms,
                                  float *out,
                                  size_t capacity,
                                  size_t *length);

// Stops the embedder's work within one op, and later work, too, until halite_embedder_reset. Threads: any,
// also while another call uses the embedder.
HaliteResult halite_embedder_cancel(const struct HaliteEmbedder *embedder);

// Takes back halite_embedder_cancel. Threads: any, also while another call uses the embedder.
HaliteResult halite_embedder_reset(const struct HaliteEmbedder *embedder);

// Saves a sequence with its KV cache to a file, completely or not at all. It replaces no file but a saved
// sequence. Threads: one at a time per session.
HaliteResult halite_session_save_file(const struct HaliteSession *session, HaliteSequence sequence, const char *path);

// Saves a sequence with its KV cache to a buffer of bytes. Threads: one at a time per session.
HaliteResult halite_session_save(const struct HaliteSession *session,
                                 HaliteSequence sequence,
                                 void *out,
                                 size_t capacity,
                                 size_t *length);

// Adds the sequence that halite_session_save_file saved. Only from sources that you trust to decide what the
// model says. Threads: one at a time per session.
HaliteResult halite_session_restore_file(struct HaliteSession *session, const char *path, HaliteSequence *sequence);

// Adds the sequence that halite_session_save saved, as halite_session_restore_file. Threads: one at a time
// per session.
HaliteResult halite_session_restore(struct HaliteSession *session,
                                    const void *bytes,
                                    size_t byte_count,
                                    HaliteSequence *sequence);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* HALITE_H */
