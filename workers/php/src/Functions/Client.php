<?php

declare(strict_types=1);

namespace Durable\Functions;

use Durable\Worker\Json;
use Durable\Worker\Unreadable;

/**
 * Asks the service: sends events, syncs functions, looks at runs. Every call is signed, and so is every answer. Of answers, 408,
 * 429 and 5xx are asked for again, and so is what was not answered at all: each call bears an id of its own or changes nothing
 * the second time.
 */
final class Client
{
    /** @var \Closure(string, string, array<string, string>, float): array{int, string, array<string, string>} */
    private readonly \Closure $post;

    /**
     * @param string $url where the service is, like http://localhost:3030
     * @param \Closure(string, string, array<string, string>, float): array{int, string, array<string, string>}|null $post
     *     url, body, headers and seconds to status, body and headers; PHP's own streams where there is none
     */
    public function __construct(
        private readonly string $url,
        private readonly string $appId,
        private readonly string $signingKey,
        private readonly int $tries = 4,
        private readonly float $timeout = 15.0,
        ?\Closure $post = null,
    ) {
        $this->post = $post ?? self::stream(...);
    }

    /**
     * Makes an app's workspace, or finds it: the same name and environment answer the same.
     *
     * @return \stdClass `{appId, signingKey}`
     * @throws ServiceError
     */
    public static function provision(
        string $url,
        string $name,
        string $environment = 'dev',
        ?string $appUrl = null,
        ?string $adminToken = null,
    ): \stdClass {
        $body = Json::encode(array_filter(['name' => $name, 'environment' => $environment, 'appUrl' => $appUrl], static fn ($one) => $one !== null));
        $headers = ['content-type' => 'application/json'] + ($adminToken === null ? [] : ['authorization' => "Bearer $adminToken"]);
        [$status, $text] = self::stream(rtrim($url, '/') . '/api/apps', $body, $headers, 15.0);

        return self::read($status, $text);
    }

    /** Tells the service what functions there are. The same again changes nothing. */
    public function sync(App $app, ?string $url = null): \stdClass
    {
        return $this->ask('/fn/sync', array_filter(
            ['sdkVersion' => App::SDK, 'url' => $url, 'functions' => $app->definitions()],
            static fn ($one) => $one !== null,
        ));
    }

    /**
     * Sends an event; the same id again changes nothing.
     *
     * @return \stdClass its id, and what it started
     */
    public function send(string $name, mixed $data = null, ?string $id = null): \stdClass
    {
        // An id of ours makes it harmless to send it again when the answer was lost.
        return $this->ask('/e', ['id' => $id ?? bin2hex(random_bytes(16)), 'name' => $name, 'data' => $data ?? new \stdClass()]);
    }

    /**
     * @param list<array{id?: string, name: string, data?: mixed}> $events 1 to 100
     * @return \stdClass `{events}`, an answer for each
     */
    public function sendMany(array $events): \stdClass
    {
        return $this->ask('/e/bulk', ['events' => array_map(
            static fn (array $one): array => $one + ['id' => bin2hex(random_bytes(16)), 'data' => new \stdClass()],
            $events,
        )]);
    }

    /** @return \stdClass the run, with its steps */
    public function run(string $runId): \stdClass
    {
        return $this->ask('/runs/get', ['runId' => $runId]);
    }

    /** @param array{functionId?: string, status?: string, cursor?: string, limit?: int} $filter */
    public function runs(array $filter = []): \stdClass
    {
        return $this->ask('/runs/search', (object) $filter);
    }

    public function cancel(string $runId): \stdClass
    {
        return $this->ask('/runs/cancel', ['runId' => $runId]);
    }

    /** A new run of the same; with `stepId` it takes over what came before that step. */
    public function rerun(string $runId, ?string $stepId = null, ?string $idempotencyKey = null): \stdClass
    {
        $body = ['runId' => $runId, 'idempotencyKey' => $idempotencyKey ?? bin2hex(random_bytes(16))];

        return $this->ask('/runs/rerun', $stepId === null ? $body : $body + ['stepId' => $stepId]);
    }

    /** @throws ServiceError */
    private function ask(string $path, mixed $body): \stdClass
    {
        $text = Json::encode($body);
        $headers = [
            'content-type' => 'application/json',
            'x-durable-app' => $this->appId,
            Signature::HEADER => Signature::of($text, $this->signingKey),
        ];
        for ($try = 1; ; ++$try) {
            [$status, $answer, $said] = ($this->post)(rtrim($this->url, '/') . $path, $text, $headers, $this->timeout);
            $again = $status === 0 || $status === 408 || $status === 429 || $status >= 500;
            if (!$again || $try >= $this->tries) {
                if ($status === 200 && Signature::signer($answer, $said[Signature::HEADER] ?? null, [$this->signingKey]) === null) {
                    throw new ServiceError('The answer is not signed with our key: is this the service?', $status, 'bad_signature');
                }

                return self::read($status, $answer);
            }
            $pause = 0.2 * 2 ** ($try - 1) * (0.5 + lcg_value() / 2);
            usleep((int) (1e6 * max($pause, min((float) ($said['retry-after'] ?? 0), 30.0))));
        }
    }

    private static function read(int $status, string $text): \stdClass
    {
        try {
            $answer = Json::decode($text);
        } catch (Unreadable) {
            $answer = null;
        }
        if ($status !== 200 || !$answer instanceof \stdClass) {
            $error = $answer->error ?? null;
            $message = $error->message ?? ($status === 0 ? "No answer: $text" : "The service answered $status.");
            throw new ServiceError((string) $message, $status, $error->code ?? null);
        }

        return $answer;
    }

    /**
     * @param array<string, string> $headers
     * @return array{int, string, array<string, string>}
     */
    private static function stream(string $url, string $body, array $headers, float $timeout): array
    {
        $lines = array_map(static fn (string $name, string $value): string => "$name: $value", array_keys($headers), $headers);
        $context = stream_context_create(['http' => [
            'method' => 'POST',
            'header' => $lines,
            'content' => $body,
            'timeout' => $timeout,
            'ignore_errors' => true,
            'follow_location' => 0,
        ]]);
        error_clear_last();
        $answer = @file_get_contents($url, false, $context, 0, App::BODY_MAX + 1);
        /** @var list<string> $http_response_header */
        $said = $http_response_header ?? [];
        if ($answer === false || $said === []) {
            return [0, error_get_last()['message'] ?? 'the connection was lost', []];
        }
        $found = [];
        foreach (array_slice($said, 1) as $line) {
            [$name, $value] = explode(':', $line, 2) + ['', ''];
            $found[strtolower(trim($name))] = trim($value);
        }

        return [preg_match('~^HTTP/\S+ (\d{3})~', $said[0], $match) === 1 ? (int) $match[1] : 0, $answer, $found];
    }
}
