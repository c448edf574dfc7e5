// Renders a template as Ollama does: its function `json`, calls as maps, tools that print as JSON. Read by a test.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type function struct {
	Name      string         `json:"name"`
	Arguments map[string]any `json:"arguments"`
}

type message struct {
	Role      string `json:"role"`
	Content   string `json:"content"`
	Thinking  string `json:"thinking"`
	ToolCalls []struct {
		Function function `json:"function"`
	} `json:"tool_calls"`
}

type raw struct{ text json.RawMessage }

func (r *raw) UnmarshalJSON(text []byte) error { r.text = append(json.RawMessage{}, text...); return nil }
func (r raw) String() string                   { return string(r.text) }

type tool struct {
	Function raw `json:"function"`
}

func main() {
	var input struct {
		Template string
		Cases    []struct {
			Messages          []*message
			Tools             []tool
			Think, IsThinkSet bool
		}
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	functions := template.FuncMap{"json": func(value any) string { text, _ := json.Marshal(value); return string(text) }}
	parsed := template.Must(template.New("").Option("missingkey=zero").Funcs(functions).Parse(input.Template))
	var rendered []string
	for _, each := range input.Cases {
		var text strings.Builder
		values := map[string]any{"Messages": each.Messages, "Tools": each.Tools, "Think": each.Think, "IsThinkSet": each.IsThinkSet}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		rendered = append(rendered, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
