#[hopline::service]
trait Mail {
    #[rpc(attempts = 8)]
    async fn send(&self) -> u64;
    #[rpc(pause = "1s")]
    async fn post(&self);
}

fn main() {}
