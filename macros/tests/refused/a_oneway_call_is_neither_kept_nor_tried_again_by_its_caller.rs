#[hopline::service]
trait Demo {
    #[rpc(oneway, retry = 2)]
    async fn put(&self);
    #[rpc(oneway, cache = "5s", stale = "30s")]
    async fn post(&self);
}

fn main() {}
