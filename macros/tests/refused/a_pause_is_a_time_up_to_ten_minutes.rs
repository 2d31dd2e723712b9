#[hopline::service]
trait Mail {
    #[rpc(oneway, pause = "0s")]
    async fn send(&self);
    #[rpc(oneway, pause = 5)]
    async fn post(&self);
    #[rpc(oneway, pause = "11m")]
    async fn write(&self);
}

fn main() {}
