//! The demo pair end to end: a real target and its trained drafters on the reference backend. Needs
//! `DSPARK_DEMO_TARGET` (tools/test.sh sets it).

mod model_support;

use std::path::{Path, PathBuf};

use dspark::engine::text::{Message, Tokenizer};
use dspark::engine::{Completion, Engine, EngineConfig, Event, Request};
use dspark::model::{DrafterConfig, GenerationConfig, Limits, Pair};
use dspark::ops::SamplingParams;
use dspark::reference::Reference;
use dspark::schedule::Policy;
use model_support::{goldens, ids};
use serde_json::Value;

const NUM_TOKENS: usize = 64;
const PAGE_SIZE: usize = 16;

/// Two of arithmetic, one of code, one of chat.
const PROMPTS: [&str; 4] = [
    "A gardener plants 7 rows of 14 tulips. A storm breaks 23 of them. How many are left? Think step by step.",
    "A train leaves at 9:40 and arrives at 11:25 with two stops of 5 minutes. How long did it drive?",
    "Write a Python function that returns the second largest number of a list.",
    "My neighbour's cat visits me every evening. How can I make it feel welcome?",
];

fn demo_target() -> Option<PathBuf> {
    let dir = std::env::var_os("DSPARK_DEMO_TARGET").map(PathBuf::from);
    if dir.is_none() {
        eprintln!("skipped 1: DSPARK_DEMO_TARGET is not set");
    }
    dir
}

fn demo_golden() -> Value {
    let golden = std::fs::read(goldens().join("demo_target.json")).unwrap();
    serde_json::from_slice(&golden).unwrap()
}

/// Completions of all prompts together; the streamed text is checked on the way.
fn generate(target: &Path, draft: Option<&str>, policy: Policy) -> Vec<Completion> {
    let tokenizer = Tokenizer::load(target).unwrap();
    let stop_tokens = GenerationConfig::read(target).unwrap().eos_token_ids;
    let draft = draft.map(|name| {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/demo");
        demo.join(name)
    });
    let draft_len = draft
        .as_ref()
        .map_or(0, |dir| match DrafterConfig::read(dir).unwrap() {
            DrafterConfig::DSpark(config) => config.block_size,
            DrafterConfig::Mtp(_) => 1,
        });
    let prompts: Vec<Vec<u32>> = PROMPTS
        .iter()
        .map(|prompt| tokenizer.encode_prompt(prompt, false).unwrap())
        .collect();
    let longest = prompts.iter().map(Vec::len).max().unwrap() + NUM_TOKENS + draft_len + 1;
    let config = EngineConfig {
        max_num_reqs: PROMPTS.len(),
        num_pages: PROMPTS.len() * longest.div_ceil(PAGE_SIZE),
        page_size: PAGE_SIZE,
        prefill_chunk: 256,
        draft_len: Some(draft_len),
        policy,
        sts_temperatures: None,
        cost: None,
    };
    let limits = Limits {
        max_num_reqs: config.max_num_reqs,
        max_rows: config.max_rows(draft_len),
        max_logit_rows: config.max_num_reqs * (1 + draft_len),
        max_draft_len: draft_len.max(1),
        num_pages: config.num_pages,
        page_size: PAGE_SIZE,
    };
    let mut ops = Reference::new(None).unwrap();
    let pair = Pair::load(&mut ops, target, draft.as_deref(), &limits).unwrap();
    let mut engine = Engine::new(ops, Box::new(pair.target), pair.drafter, config).unwrap();
    for prompt_ids in prompts {
        let request = Request {
            stop_tokens: stop_tokens.clone(),
            text: Some(Box::new(tokenizer.stream())),
            ..Request::new(prompt_ids, SamplingParams::default(), NUM_TOKENS)
        };
        engine.submit(request).unwrap();
    }
    let mut streamed = vec![String::new(); PROMPTS.len()];
    let mut done: Vec<Option<Completion>> = vec![None; PROMPTS.len()];
    engine
        .run(|event| match event {
            Event::Tokens { request, pieces } => {
                streamed[request].extend(pieces.iter().map(|piece| piece.text.as_str()));
            }
            Event::Finished {
                request,
                completion,
            } => done[request] = Some(*completion),
        })
        .unwrap();
    let done: Vec<Completion> = done.into_iter().map(Option::unwrap).collect();
    for (streamed, completion) in streamed.iter().zip(&done) {
        assert_eq!(streamed, &completion.text);
        assert_eq!(
            completion.text,
            tokenizer.decode(&completion.tokens).unwrap()
        );
    }
    done
}

fn accepted_length(completions: &[Completion]) -> f64 {
    let rounds = completions.iter().flat_map(|c| &c.rounds);
    let (mut num_rounds, mut num_committed) = (0, 0);
    for round in rounds {
        num_rounds += 1;
        num_committed += round.committed.len();
    }
    num_committed as f64 / f64::from(num_rounds)
}

#[test]
fn drafters_change_the_speed_and_not_the_text() {
    let Some(target) = demo_target() else { return };
    let texts = |completions: &[Completion]| -> Vec<String> {
        completions.iter().map(|c| c.text.clone()).collect()
    };
    let plain = generate(&target, None, Policy::Fixed);
    assert!(plain.iter().all(|c| c.text.len() > 40), "{plain:?}");
    let check = |draft, policy| {
        let completions = generate(&target, Some(draft), policy);
        assert_eq!(texts(&completions), texts(&plain), "{draft}, {policy}");
        let tokens = |c: &[Completion]| c.iter().map(|c| c.tokens.clone()).collect::<Vec<_>>();
        assert_eq!(tokens(&completions), tokens(&plain), "{draft}, {policy}");
        accepted_length(&completions)
    };
    let mtp = check("mtp", Policy::Fixed);
    let dspark = check("dspark", Policy::Fixed);
    let threshold = check("dspark", Policy::Threshold(0.4));
    check("dspark", Policy::Adaptive);
    assert!(
        1.0 < mtp && mtp < dspark,
        "accepted length {dspark} of dspark, {mtp} of mtp"
    );
    // Drafts it does not believe in cost it little.
    assert!(
        1.0 < threshold && threshold <= dspark,
        "{threshold} with a threshold, {dspark} without"
    );
}

#[test]
fn the_tokenizer_is_that_of_transformers() {
    let Some(target) = demo_target() else { return };
    let (tokenizer, golden) = (Tokenizer::load(&target).unwrap(), demo_golden());
    for string in golden["strings"].as_array().unwrap() {
        let text = string["text"].as_str().unwrap();
        let expected = ids(&string["ids"]);
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{text:?}");
        let decoded = string["decoded_skip_special"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&expected).unwrap(), decoded);
        let mut stream = tokenizer.stream();
        let mut streamed: String = expected.iter().map(|&id| push(&mut stream, id)).collect();
        streamed += &dspark::engine::TextStream::finish(&mut stream);
        assert_eq!(streamed, decoded);
    }
}

fn push(stream: &mut impl dspark::engine::TextStream, token: u32) -> String {
    stream.push(token)
}

#[test]
fn chats_render_as_in_transformers() {
    let Some(target) = demo_target() else { return };
    let (tokenizer, golden) = (Tokenizer::load(&target).unwrap(), demo_golden());
    let opened = |chat: &&Value| chat["add_generation_prompt"] == true;
    let chats: Vec<&Value> = golden["chats"]
        .as_array()
        .unwrap()
        .iter()
        .filter(opened)
        .collect();
    assert!(!chats.is_empty());
    for chat in chats {
        let messages: Vec<Message> = chat["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| Message {
                role: message["role"].as_str().unwrap().into(),
                content: message["content"].as_str().unwrap().into(),
            })
            .collect();
        let expected = chat["text"].as_str().unwrap();
        assert_eq!(tokenizer.render_chat(&messages).unwrap(), expected);
    }
    for prompt in golden["prompts"].as_array().unwrap() {
        let question = prompt["question"].as_str().unwrap();
        let found = tokenizer.encode_prompt(question, false).unwrap();
        assert_eq!(found, ids(&prompt["ids"]), "{question}");
    }
}
